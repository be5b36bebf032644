"""`opt-train run`: prepared data, a run directory, a supervisor over it, and what came of it."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import opt_logbook
from opt_logbook.record import journal
from opt_logbook.record.events import (
    JournalDamaged,
    JournalMended,
    LineageOpened,
    Note,
    RunCreated,
    RunFinished,
)
from opt_logbook.record.run_directory import RunDirectory

import opt_train
from opt_train.cli.about import summary
from opt_train.config.compose import to_yaml
from opt_train.config.difference import difference
from opt_train.config.run_config import RunConfig, from_json, to_json
from opt_train.data.manifest import DATASET_FILE, TOKENIZER_FILE, DatasetManifest, check_fits
from opt_train.data.prepare import check_prepared_by, directory_of
from opt_train.data.prepare_sets import check_sets
from opt_train.exchange.imported import check_initial_weights, check_same_tokenizer
from opt_train.model.sizes import parameter_count
from opt_train.protocol.exits import DONE, BadInput
from opt_train.run.checkpoint import MEMORY, NODE, SHARED
from opt_train.sinks.start import SinkProcesses

REMARKS = (Note, JournalMended, JournalDamaged)
"""Lines that anybody may add to a run at rest; it stays what it was."""

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the weight and AdamW's two moments, each in fp32."""

PACKAGES = ("torch", "numpy", "hydra-core", "datasets", "tokenizers", "safetensors")
"""What else decides the numbers; their versions go into every attempt's journal line, and a lineage
keeps to them."""

RANKS_A_CORE = 8
"""More on a machine without GPUs are a mistake: tests and trials have two or four."""

FILES_NAMED = 3
"""Sources that are told by name when they are not those a lineage began with; the others are
counted."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What this start is in the life of the run."""

    lineage: int
    """The lineage it trains in."""
    opens_lineage: bool
    lineage_difference: tuple[str, ...]
    operational_difference: tuple[str, ...]
    is_new: bool
    is_finished: bool


def run(config: RunConfig, prepare: Callable[[], int]) -> int:
    """Train until done, stopped or in need of a person; the same call resumes.

    Args:
        prepare: makes sure the data is prepared and whole, in a process of its own; returns its
            exit code.

    Raises:
        BadInput: the run cannot begin, or not with this configuration. Nothing has been started or
            changed then.
    """
    directory, resolved = resolve(config)
    data = Path(resolved.data.directory)
    plan = plan_of(directory, resolved, asked_for_lineage=config.lineage == "new")
    if plan.is_finished:
        print(summary(directory))
        return DONE
    check_machine(config)
    if plan.is_new:
        check_room(directory, config)
        check_beginning(resolved)
    if plan.is_new or not _has_all(data, resolved):
        code = prepare()
        if code != DONE:
            return code
    manifest = DatasetManifest.read(data)
    check_prepared_by(manifest, resolved.data, resolved.tokenizer, data)
    check_fits(
        manifest, vocab_size=config.model.vocab_size, sequence_length=config.data.sequence_length
    )
    check_same_data(directory, manifest)
    if plan.is_new:
        check_words(resolved)

    code = _supervise(
        directory, resolved, created_event(resolved, manifest), plan, config.lineage == "new"
    )
    if directory.journal.exists():  # somebody may have removed the run under its supervisor
        print(summary(directory))
    return code


def _has_all(data: Path, config: RunConfig) -> bool:
    """Whether the prepared data is there, with every named validation set."""
    return (data / DATASET_FILE).exists() and not check_sets(
        DatasetManifest.read(data), config.data, data
    )


def _supervise(
    directory: RunDirectory,
    config: RunConfig,
    created: RunCreated,
    plan: Plan,
    asked_for_lineage: bool,
) -> int:
    from opt_train.supervisor.shell.start import supervise

    sinks = SinkProcesses(directory, config.sinks, warn)

    def write() -> None:
        # Somebody else may have had the run since the plan was made.
        if plan_of(directory, config, asked_for_lineage) != plan:
            raise BadInput(
                f"{directory.path} was changed by another process meanwhile; start again"
            )
        write_configuration(directory, config, plan)
        sinks.start()

    commit, dirty = git_state()
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from None
    try:
        return supervise(
            config,
            directory,
            created,
            write_configuration=write,
            opens_lineage=plan.opens_lineage,
            lineage_difference=plan.lineage_difference,
            operational_difference=plan.operational_difference,
            git_commit=commit,
            git_dirty=dirty,
            packages=versions(),
        )
    finally:
        sinks.close()


def check_beginning(config: RunConfig) -> None:
    """Check that a new run can begin with `train.initial_weights`.

    Raises:
        BadInput: they are not there, of another model, or came with another tokenizer than the one
            named.
    """
    if config.train.initial_weights:
        folder = Path(config.train.initial_weights)
        check_initial_weights(folder, config.model)
        if config.tokenizer.vocab_file:  # known before the data is prepared, which may take hours
            check_same_tokenizer(folder, config.tokenizer)


def check_words(config: RunConfig) -> None:
    """Check that `train.initial_weights` know the ids of a new run's data, which is prepared.

    Raises:
        BadInput: they came with another tokenizer.
    """
    if config.train.initial_weights:
        check_same_tokenizer(
            Path(config.train.initial_weights), Path(config.data.directory, TOKENIZER_FILE)
        )


def warn(sentence: str) -> None:
    """Tell the person at the terminal something that changes nothing about the run."""
    with contextlib.suppress(OSError):
        print(f"opt-train: {sentence}", file=sys.stderr, flush=True)


def resolve(config: RunConfig) -> tuple[RunDirectory, RunConfig]:
    """The run's directory, and the configuration as it is kept there: without the request for a
    lineage, and with the full paths of the data and of initial weights, so that ranks find them
    wherever their agent was started."""
    data = directory_of(config.data, config.tokenizer).absolute()
    resolved = replace(config, lineage="", data=replace(config.data, directory=str(data)))
    if weights := config.train.initial_weights:
        resolved = replace(
            resolved, train=replace(config.train, initial_weights=str(Path(weights).absolute()))
        )
    return RunDirectory(Path(config.runs, config.name).absolute()), resolved


# Which configuration, and whether it may ----------------------------------------------------------


def plan_of(directory: RunDirectory, config: RunConfig, asked_for_lineage: bool) -> Plan:
    """Compare `config` and the code that runs with what the run directory says was trained there.

    Raises:
        BadInput: fixed keys differ; training keys or code differ and no new lineage was asked for;
            the folder is none of ours; a lineage was asked for where there is nothing to go on
            from; the journal is too damaged to tell.
    """
    reading = journal.read(directory.journal)
    entries = reading.entries
    lineages = [entry.event.lineage for entry in entries if isinstance(entry.event, LineageOpened)]
    if not lineages:
        if reading.damaged:
            lines = ", ".join(str(damage.line) for damage in reading.damaged)
            raise BadInput(
                f"{directory.journal} is damaged (line {lines}), and no line is left that tells "
                "what was trained here; "
                "restore it from a copy, or choose another name="
            )
        if (left := _left_by_training(directory)) or (not entries and journal.read_head(directory)):
            raise BadInput(
                f"{directory.journal} no longer tells what was trained here, though "
                f"{left or directory.head} is there; "
                "restore journal.jsonl and journal.head from a copy, or choose another name="
            )
        if asked_for_lineage:
            raise BadInput(f"lineage=new has nothing to go on from: {directory.path} holds no run")
        if not directory.config_json.exists() and _strangers_in(directory):
            raise BadInput(
                f"{directory.path} exists and is no run directory; choose another name= or runs=, "
                "or remove it if nothing in it is wanted"
            )
        return Plan(1, False, (), (), is_new=True, is_finished=False)
    # A lineage's own copy is compared, not the newest configuration: a crash between writing that
    # and journalling the new lineage must not make the change look as if it had been agreed to.
    kept = _code_of(directory, lineages[-1])
    began_with = difference(_read(kept / "config.json"), config)
    if began_with.fixed:
        raise BadInput(
            f"{directory.path} was trained with another model or other data "
            f"({'; '.join(began_with.fixed)}), "
            "which nothing trained there fits; choose another name="
        )
    training = began_with.training
    operational = difference(_read(directory.config_json), config).operational
    last = next(entry.event for entry in reversed(entries) if not isinstance(entry.event, REMARKS))
    if not training and isinstance(last, RunFinished):
        # Nothing will be computed any more, so newer code changes nothing.
        return Plan(lineages[-1], False, (), operational, is_new=False, is_finished=True)
    changed = (*training, *_code_difference(kept))
    if changed and not asked_for_lineage:
        what, this = (
            ("another configuration", "this one") if training else ("other code", "this code")
        )
        raise BadInput(
            f"{directory.path} was trained with {what} ({'; '.join(changed)}); "
            f"add lineage=new to go on from its newest checkpoint with {this}, or choose another "
            "name="
        )
    lineage = lineages[-1] + bool(changed)
    return Plan(lineage, bool(changed), changed, operational, is_new=False, is_finished=False)


def _strangers_in(directory: RunDirectory) -> bool:
    """Whether the folder holds more than a start leaves that came no further than its lock."""
    return directory.path.exists() and any(
        path != directory.lock for path in directory.path.iterdir()
    )


def _left_by_training(directory: RunDirectory) -> Path | None:
    """A file that is there only where ranks have trained."""
    folders = [
        directory.metrics,
        *(directory.checkpoints_of(tier) for tier in (SHARED, MEMORY, NODE)),
    ]
    return next((path for folder in folders for path in folder.rglob("*") if path.is_file()), None)


def _read(path: Path) -> RunConfig:
    try:
        return from_json(path)
    except (OSError, ValueError, BadInput) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); restore it, or choose another name="
        ) from None


def _code_difference(kept: Path) -> list[str]:
    """What runs now and is not in `kept`, a lineage's copy: versions of `PACKAGES` first, then
    sources.

    Raises:
        BadInput: the copy cannot be read.
    """
    try:
        lines = (kept / "packages.txt").read_text().splitlines()
        before = _sources({package: kept / package for package in _packages()})
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{kept} cannot be read ({error}); restore it, or choose another name="
        ) from None
    recorded = dict(line.split("==", 1) for line in lines if "==" in line)
    installed = versions()
    found = [
        f"{package}: {recorded.get(package, 'absent')} -> {installed[package]}"
        for package in PACKAGES
        if recorded.get(package) != installed[package]
    ]
    now = _sources(_packages())
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    for name in names[:FILES_NAMED]:
        fate = "new" if name not in before else "gone" if name not in now else "changed"
        found.append(f"code: {name} {fate}")
    if len(names) > FILES_NAMED:
        found.append(f"code: and {len(names) - FILES_NAMED} more")
    return found


def _packages() -> dict[str, Path]:
    """The packages whose code decides what a run computes and records, and where they run from."""
    return {package.__name__: Path(package.__path__[0]) for package in (opt_train, opt_logbook)}


def _sources(packages: Mapping[str, Path]) -> dict[str, bytes]:
    """Name to content of each source file. Presets and launch scripts, which a wheel carries along,
    are none."""
    return {
        f"{package}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for package, folder in packages.items()
        for path in folder.rglob("*.py")
    }


def check_same_data(directory: RunDirectory, manifest: DatasetManifest) -> None:
    """Refuse to go on with other tokens than the run began with.

    Raises:
        BadInput: the data's fingerprint has changed.
    """
    for entry in journal.read(directory.journal).entries[:1]:
        event = entry.event
        if isinstance(event, RunCreated) and event.data_fingerprint not in (
            "",
            manifest.fingerprint,
        ):
            raise BadInput(
                f"data.directory holds other tokens than those {directory.path} was trained on "
                f"({manifest.fingerprint[:12]} instead of {event.data_fingerprint[:12]}); prepare "
                "the same corpus again"
            )


def check_machine(config: RunConfig) -> None:
    """Refuse to start a cluster's recipe on one machine by mistake, with a process for every rank
    of it.

    Raises:
        BadInput: the local cluster's ranks are more than this machine can be meant to hold.
    """
    if config.cluster.kind != "local":
        return
    gpus = (
        0
        if config.train.device == "cpu"
        else sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))
    )
    cores = len(os.sched_getaffinity(0))
    has = f"{gpus} GPUs" if gpus else f"{cores} cores"
    if config.world_size > (gpus or RANKS_A_CORE * cores):
        raise BadInput(
            f"cluster=local would start {config.world_size} ranks on this machine of {has}; "
            "set cluster.nodes=1 cluster.buffer_nodes=0 and cluster.slots_per_node to what it holds"
        )


def check_room(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse a new run where its directory cannot be made or its checkpoints cannot lie.

    Raises:
        BadInput: the folder cannot be written, or has too little space for the checkpoints to be
            kept.
    """
    above = next(p for p in directory.path.parents if p.exists())
    if not above.is_dir():
        raise BadInput(f"runs={config.runs} is not a folder; choose another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"runs={config.runs} cannot be written to; mend the permissions of {above} or choose "
            "another runs="
        )
    free = shutil.disk_usage(above).free
    parameters = parameter_count(config.model)
    kept = config.checkpoint.most_kept(config.train.steps)
    needed = BYTES_PER_PARAMETER * parameters * (kept + 1)
    if free < needed:
        raise BadInput(
            f"runs={config.runs} has {_size(free)} free, but {kept} checkpoints of {parameters:,} "
            f"parameters and the next one take {_size(needed)}; make space or choose another runs="
        )


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


# The run directory --------------------------------------------------------------------------------


def write_configuration(directory: RunDirectory, config: RunConfig, plan: Plan) -> None:
    """Configuration and code into the run directory. The caller holds its lock.

    Raises:
        BadInput: the folder cannot be written.
    """
    try:
        if plan.is_new or plan.opens_lineage:
            _copy_code(_code_of(directory, plan.lineage), config)
        _replace(directory.config_json, to_json(config))
        _replace(directory.config, to_yaml(config))
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: RunDirectory, error: OSError) -> BadInput:
    mend = "make space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend its permissions"
    return BadInput(
        f"{directory.path} cannot be written ({error.strerror}); {mend} or choose another runs="
    )


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _code_of(directory: RunDirectory, lineage: int) -> Path:
    return directory.path / "code" / str(lineage)


def _copy_code(target: Path, config: RunConfig) -> None:
    """The sources, versions and configuration that a lineage begins with."""
    # What an earlier start left that died before it could journal the lineage.
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package, source in _packages().items():
        shutil.copytree(source, target / package, ignore=ignore, dirs_exist_ok=True)
    installed: dict[str, str] = {}
    for distribution in metadata.distributions():
        # The first on the path is the one that is imported.
        installed.setdefault(distribution.name.lower().replace("_", "-"), distribution.version)
    listed = sorted(f"{name}=={version}" for name, version in installed.items())
    _replace(
        target / "packages.txt", "\n".join([f"# Python {sys.version.split()[0]}", *listed]) + "\n"
    )
    _replace(target / "config.json", to_json(config))


# What the journal is told -------------------------------------------------------------------------


def created_event(config: RunConfig, manifest: DatasetManifest) -> RunCreated:
    """The first line of the run's journal."""
    return RunCreated(
        name=config.name,
        seed=config.seed,
        model=config.model.name,
        parameters=parameter_count(config.model),
        steps=config.train.steps,
        tokens_per_step=config.train.global_batch * config.data.sequence_length,
        tokenizer=manifest.tokenizer,
        data=manifest.name,
        data_fingerprint=manifest.fingerprint,
        train_tokens=manifest.train_tokens,
        validation_tokens=manifest.validation_tokens,
        unigram_perplexity=manifest.unigram_perplexity,
        learning_rate=config.optim.lr,
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": sys.version.split()[0], "opt-train": metadata.version("opt-train")}
    for package in PACKAGES:
        found[package] = metadata.version(package)
    return found


def git_state() -> tuple[str, bool]:
    """Commit of the checkout this code runs from, and whether it has changes; empty outside a
    checkout."""
    package = Path(opt_train.__path__[0]).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        # An installed wheel may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return "", False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False
