"""What this start is in the life of its run, and what a lineage keeps: its configuration and code.

A lineage is one training configuration and one code. Each keeps a copy of both under
`code/<lineage>/`, and a start is compared with that copy: what differs is refused, or opens the
next lineage where a person asked for it. Where agents and ranks run from the copy, other code of
the installation is none of the run's: it supervises, and that it differs is told.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from opt_logbook.record import journal
from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.events import (
    JournalDamaged,
    JournalRepaired,
    LineageOpened,
    Note,
    RunFinished,
)
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.compose import to_yaml
from opt_train.config.difference import difference
from opt_train.config.run_config import RunConfig, from_json, to_json
from opt_train.data.prepared import directory_of
from opt_train.protocol.exits import BadInput
from opt_train.run.admission import unwritable
from opt_train.run.checkpoint import MEMORY, NODE, SHARED
from opt_train.run.code.code_state import CodeState, read_code_state
from opt_train.run.code.frozen_code import (
    CodeDifference,
    code_difference,
    freeze,
    read_record,
    sha256_of_running_code,
    sha256_of_sources,
    why_not_understood,
)
from opt_train.run.understood import wire_signature

REMARKS = (Note, JournalRepaired, JournalDamaged)
"""Lines that anybody may add to a run at rest; it stays what it was."""


@dataclass(frozen=True, slots=True)
class RunStart:
    """What this start is in the life of the run."""

    lineage: int
    """The lineage it trains in."""
    opens_lineage: bool
    lineage_difference: tuple[str, ...]
    operational_difference: tuple[str, ...]
    is_new: bool
    is_finished: bool
    code: CodeState = field(default_factory=CodeState)
    """The code that trains."""
    code_sha256: str = ""
    """Of its copy's sources; empty: not on record."""
    supervisor_difference: tuple[str, ...] = ()
    """What runs here and is not the code that trains."""


def resolve(config: RunConfig) -> tuple[RunDirectory, RunConfig]:
    """The run's directory, and the configuration as it is kept there: without the requests for a
    lineage and a ledger, and with the full paths of the data and of initial weights, so that ranks
    find them wherever their agent was started."""
    data = directory_of(config.data, config.tokenizer).absolute()
    resolved = replace(
        config, lineage="", ledger="", data=replace(config.data, directory=str(data))
    )
    if weights := config.train.initial_weights:
        resolved = replace(
            resolved, train=replace(config.train, initial_weights=str(Path(weights).absolute()))
        )
    return RunDirectory(config.run_path.absolute()), resolved


def classify_start(
    directory: RunDirectory, config: RunConfig, asked_for_lineage: bool, runs_copy: bool = False
) -> RunStart:
    """Compare `config` and the code that runs with what the run directory says was trained there.

    Args:
        runs_copy: what trains is started from the lineage's copy, whatever is installed.

    Raises:
        BadInput: fixed keys differ; training keys or code differ and no new lineage was asked for;
            the folder is none of ours; a lineage was asked for where there is nothing to go on
            from; the journal is too damaged to tell; the copy was changed, or does not understand
            the code that runs here.
    """
    reading = journal.read(directory.journal)
    entries = reading.entries
    lineages = [entry.event for entry in entries if isinstance(entry.event, LineageOpened)]
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
        return _with_running_code(RunStart(1, False, (), (), is_new=True, is_finished=False))
    # A lineage's own copy is compared, not the newest configuration: a crash between writing that
    # and journalling the new lineage must not make the change look as if it had been agreed to.
    newest = lineages[-1]
    kept = code_of(directory, newest.lineage)
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
        return RunStart(newest.lineage, False, (), operational, is_new=False, is_finished=True)
    code = code_difference(kept)
    goes_on = RunStart(newest.lineage, False, (), operational, is_new=False, is_finished=False)
    if not (training or code.packages or asked_for_lineage) and runs_copy and newest.code_sha256:
        return _with_copy(goes_on, kept, newest.code_sha256, code, config)
    changed = (*training, *code.packages, *code.sources)
    if changed and not asked_for_lineage:
        what, this = (
            ("another configuration", "this one") if training else ("other code", "this code")
        )
        raise BadInput(
            f"{directory.path} was trained with {what} ({'; '.join(changed)}); "
            f"add lineage=new to go on from its newest checkpoint with {this}, or choose another "
            "name="
        )
    if not changed:
        return _with_running_code(goes_on)
    opens = replace(
        goes_on, lineage=newest.lineage + 1, opens_lineage=True, lineage_difference=changed
    )
    return _with_running_code(opens)


def _with_running_code(start: RunStart) -> RunStart:
    return replace(start, code=read_code_state(), code_sha256=sha256_of_running_code())


def _with_copy(
    start: RunStart, kept: Path, sha256: str, code: CodeDifference, config: RunConfig
) -> RunStart:
    """A start whose training goes on from the lineage's copy.

    Raises:
        BadInput: it is not what was copied, or does not understand the code that runs here.
    """
    # The hash of the journal, not that of the copy's own record: who edits the one can edit the
    # other, and the journal's lines are chained.
    record = read_record(kept)
    if record is None or sha256_of_sources(kept) != sha256:
        raise BadInput(
            f"{kept} is not the code that was copied there when the lineage began; restore it, or "
            "add lineage=new to go on with the code that is installed"
        )
    if code.sources and (why := why_not_understood(kept, config, wire_signature())):
        commit = f" (commit {record.state.git_commit})" if record.state.git_commit else ""
        raise BadInput(
            f"{kept} trains, and cannot be supervised by the code that is installed: {why}; "
            f"start this with the code that it began with{commit}, or add lineage=new to train "
            "with the one that is installed"
        )
    return replace(start, code=record.state, code_sha256=sha256, supervisor_difference=code.sources)


def _strangers_in(directory: RunDirectory) -> bool:
    """Whether the folder holds more than a start leaves that came no further than its lock, or its
    way to Slurm, and who asked for something meanwhile."""
    return directory.path.exists() and any(
        path not in (directory.lock, directory.submit, directory.inbox)
        for path in directory.path.iterdir()
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


# The run directory --------------------------------------------------------------------------------


def write_configuration(directory: RunDirectory, config: RunConfig, start: RunStart) -> None:
    """Configuration and code into the run directory. The caller holds its lock.

    Raises:
        BadInput: the folder cannot be written.
    """
    try:
        if start.is_new or start.opens_lineage:
            freeze(code_of(directory, start.lineage), config)
        replace_file(directory.config_json, to_json(config).encode(), durable=True)
        replace_file(directory.config, to_yaml(config).encode(), durable=True)
    except OSError as error:
        raise unwritable(directory, error) from None


def code_of(directory: RunDirectory, lineage: int) -> Path:
    """Where a lineage's copy of its code is."""
    return directory.path / "code" / str(lineage)
