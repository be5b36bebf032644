"""`opt-train run`: prepared data, a run directory, a supervisor over it, and what came of it."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.events import RunCreated
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.jobs import Job, call
from opt_train.clusters.cluster import Cluster
from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DATASET_FILE, DatasetManifest
from opt_train.data.prepared import check_sets
from opt_train.protocol.exits import DONE, STOPPED, BadInput
from opt_train.run.admission import (
    admitted_data,
    check_room,
    check_weights_fit_data,
    check_weights_fit_model,
    unwritable,
)
from opt_train.run.entries import run_created
from opt_train.run.hold_requests import why_held
from opt_train.run.lineage import (
    RunStart,
    classify_start,
    code_of,
    resolve,
    write_configuration,
)
from opt_train.run.past.taken_ledger import take_ledger
from opt_train.run.report.run_report import summary
from opt_train.sinks.sink_processes import SinkProcesses


def run(job: Job) -> int:
    """Train the job's configuration under a supervisor.

    Raises:
        BadInput: the run cannot begin, or not with this configuration.
    """
    # Preparing loads the libraries of tokenizer and corpus; a process of its own takes them with it
    # when it ends, while this one stays for months.
    return run_supervised(job.config, prepare=lambda: call(["prepare", *job.arguments]))


def run_supervised(config: RunConfig, prepare: Callable[[], int]) -> int:
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
    start = classify_start(directory, resolved, config.lineage == "new", config.cluster.runs_copy)
    taken = take_ledger(directory, resolved, config.ledger)
    if start.is_finished:
        print(summary(directory))
        return DONE
    cluster = make_cluster(config.cluster, directory)
    cluster.check_before_start(config)
    if held := held_at_rest(directory, cluster):
        print(f"opt-train: {held}")
        return STOPPED
    if start.is_new:
        check_room(directory, config)
        check_weights_fit_model(resolved)
    if start.is_new or not _has_all(data, resolved):
        code = prepare()
        if code != DONE:
            return code
    manifest = admitted_data(directory, resolved)
    if start.is_new:
        check_weights_fit_data(resolved)

    created = run_created(resolved, manifest, taken)
    warn_of_ledger(created)
    code = _supervise(directory, resolved, created, start, config.lineage == "new")
    if directory.journal.exists():  # somebody may have removed the run under its supervisor
        print(summary(directory))
    return code


def held_at_rest(directory: RunDirectory, cluster: Cluster) -> str:
    """Why a supervisor may not begin, as a person holds the run; empty: it may.

    Raises:
        BadInput: the cluster cannot say whether ranks of the held run live.
    """
    if not (held := why_held(directory)):
        return ""
    try:
        # Ranks that an earlier supervisor left are led once more, to save and stop.
        return "" if cluster.living_agents() else held
    except OSError as error:
        raise BadInput(f"{held}, and whether ranks still live is not known ({error})") from None


def _has_all(data: Path, config: RunConfig) -> bool:
    """Whether the prepared data is there, with every named validation set."""
    return (data / DATASET_FILE).exists() and not check_sets(
        DatasetManifest.read(data), config.data, data
    )


def _supervise(
    directory: RunDirectory,
    config: RunConfig,
    created: RunCreated,
    start: RunStart,
    asked_for_lineage: bool,
) -> int:
    from opt_train.supervisor.shell.start import supervise

    sinks = SinkProcesses(directory, config.sinks, warn)
    runs_copy = config.cluster.runs_copy
    kept = code_of(directory, start.lineage)
    if start.supervisor_difference:
        warn(
            f"trains with {kept} as before; what is installed differs "
            f"({'; '.join(start.supervisor_difference)}) and only supervises: add lineage=new to "
            "train with it"
        )

    def write() -> None:
        # Somebody else may have had the run since the start was classified.
        if classify_start(directory, config, asked_for_lineage, runs_copy) != start:
            raise BadInput(
                f"{directory.path} was changed by another process meanwhile; start again"
            )
        write_configuration(directory, config, start)
        sinks.start()

    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(directory, error) from None
    try:
        return supervise(
            config,
            directory,
            created,
            write_configuration=write,
            opens_lineage=start.opens_lineage,
            lineage_difference=start.lineage_difference,
            operational_difference=start.operational_difference,
            git_commit=start.code.git_commit,
            git_dirty=start.code.git_dirty,
            packages=start.code.packages,
            code=kept if runs_copy else None,
            code_sha256=start.code_sha256,
            supervisor_difference=start.supervisor_difference,
        )
    finally:
        sinks.close()


def warn_of_ledger(created: RunCreated | None) -> None:
    """Tell the person what of a run that takes another's ledger is not as it was there."""
    if created is not None and created.ledger_difference:
        warn(
            f"trains under the ledger of {created.ledger_of} and is not configured alike, so its "
            f"weights will not be the same: {'; '.join(created.ledger_difference)}"
        )


def warn(sentence: str) -> None:
    """Tell the person at the terminal something that changes nothing about the run."""
    with contextlib.suppress(OSError):
        print(f"opt-train: {sentence}", file=sys.stderr, flush=True)
