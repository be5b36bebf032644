"""`opt-train run`: prepared data, a run directory, a supervisor over it, and what came of it."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.events import RunCreated
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.jobs import Job, call
from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DATASET_FILE, DatasetManifest
from opt_train.data.prepared import check_sets
from opt_train.protocol.exits import DONE, BadInput
from opt_train.run.admission import (
    admitted_data,
    check_room,
    check_weights_fit_data,
    check_weights_fit_model,
    unwritable,
)
from opt_train.run.code_state import read_code_state
from opt_train.run.entries import run_created
from opt_train.run.lineage import (
    RunStart,
    classify_start,
    resolve,
    write_configuration,
)
from opt_train.run.report import summary
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
    start = classify_start(directory, resolved, asked_for_lineage=config.lineage == "new")
    if start.is_finished:
        print(summary(directory))
        return DONE
    make_cluster(config.cluster, directory).check_before_start(config)
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

    code = _supervise(
        directory, resolved, run_created(resolved, manifest), start, config.lineage == "new"
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
    start: RunStart,
    asked_for_lineage: bool,
) -> int:
    from opt_train.supervisor.shell.start import supervise

    sinks = SinkProcesses(directory, config.sinks, warn)

    def write() -> None:
        # Somebody else may have had the run since the start was classified.
        if classify_start(directory, config, asked_for_lineage) != start:
            raise BadInput(
                f"{directory.path} was changed by another process meanwhile; start again"
            )
        write_configuration(directory, config, start)
        sinks.start()

    code = read_code_state()
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
            git_commit=code.git_commit,
            git_dirty=code.git_dirty,
            packages=code.packages,
        )
    finally:
        sinks.close()


def warn(sentence: str) -> None:
    """Tell the person at the terminal something that changes nothing about the run."""
    with contextlib.suppress(OSError):
        print(f"opt-train: {sentence}", file=sys.stderr, flush=True)
