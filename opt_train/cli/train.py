"""`opt-train train`: one rank without agent and supervisor, alone or as torchrun starts it.

Here it gets a record of its own (`run/standalone.py`): the same training code, the same run
directory, so that a run begun like this can go on under `opt-train run`, and the other way round.
"""

import os
import sys
from dataclasses import replace

from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.jobs import Job
from opt_train.cli.run import warn, warn_of_ledger
from opt_train.config.checks import check
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import (
    BAD_INPUT,
    DONE,
    NO,
    PERSON_MUST_DECIDE,
    RANK_BAD_CONFIG,
    RANK_UNSTABLE,
    STOPPED,
    BadInput,
)
from opt_train.protocol.standalone import StandaloneBegin
from opt_train.run.admission import check_weights_fit_model
from opt_train.run.hold_requests import why_held
from opt_train.run.lineage import classify_start, resolve
from opt_train.run.past.taken_ledger import take_ledger
from opt_train.run.report.run_report import summary
from opt_train.run.standalone import StandaloneRun
from opt_train.sinks.sink_processes import SinkProcesses
from opt_train.train.fact_pipe import log_line
from opt_train.train.standalone import train_standalone

EXIT_OF = {RANK_BAD_CONFIG: BAD_INPUT, RANK_UNSTABLE: PERSON_MUST_DECIDE}
"""What a rank's own exit codes are to the person who started it."""

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a rank that is not alone finds in its environment."""


def run(job: Job) -> int:
    """Train the job's configuration in this process."""
    return train(job.config)


def train(config: RunConfig) -> int:
    """Train until the steps are done or a signal asks to stop; resumes from the newest good
    checkpoint.

    Raises:
        BadInput: the run cannot begin or go on like this.
    """
    config = _as_started(config)
    directory, resolved = resolve(config)
    start = classify_start(directory, resolved, asked_for_lineage=config.lineage == "new")
    taken = take_ledger(directory, resolved, config.ledger)
    leads = os.environ.get("RANK", "0") == "0"
    if start.is_finished:
        if leads:
            print(summary(directory))
        return DONE
    if held := why_held(directory):
        if leads:
            print(f"opt-train: {held}")
        return STOPPED
    if start.is_new:
        check_weights_fit_model(resolved)
    standalone = StandaloneRun(directory, resolved, start, log_line, taken)
    sinks = SinkProcesses(directory, resolved.sinks, warn)

    def open_run() -> StandaloneBegin:  # on rank 0 alone
        begin = standalone.open()
        warn_of_ledger(standalone.created)
        sinks.start()
        return begin

    try:
        code = train_standalone(resolved, open_run, standalone.reject_checkpoint, standalone.record)
    except BadInput:
        if not standalone.question:
            raise
        print(f"opt-train: {standalone.question}")
        return PERSON_MUST_DECIDE
    finally:
        standalone.close()
        sinks.close()
    if standalone.is_unsaved:
        code = NO
    if leads:
        _render(directory)
        log_line(summary(directory))
    code = EXIT_OF.get(code, code)
    if config.parallel.engine != "fsdp2":
        # Both other engines sometimes abort the interpreter as it ends, when all is done (1 exit in
        # 10, measured).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _render(directory: RunDirectory) -> None:
    """Tell the story so far; a picture that cannot be drawn must not change what the run came
    to."""
    from opt_logbook.render.render import render

    try:
        render(directory)
    except Exception as error:
        log_line(
            f"the chronicle could not be rendered ({error}); try: logbook render {directory.path}"
        )


def _as_started(config: RunConfig) -> RunConfig:
    """The configuration with the nodes and slots that torchrun gave, or a single rank."""
    world, local = _degree("WORLD_SIZE"), _degree("LOCAL_WORLD_SIZE")
    missing = [name for name in OF_TORCHRUN if name not in os.environ]
    if missing and (world > 1 or "RANK" in os.environ):
        raise BadInput(
            f"no {' and no '.join(missing)} beside "
            f"{'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} in the "
            "environment; start the ranks with torchrun, or unset it to train alone"
        )
    if world % local:
        raise BadInput(
            f"WORLD_SIZE={world} is no multiple of LOCAL_WORLD_SIZE={local}; start as many ranks "
            "on each node"
        )
    cluster = replace(config.cluster, nodes=world // local, slots_per_node=local, buffer_nodes=0)
    config = replace(config, cluster=cluster)
    check(config)
    return config


def _degree(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(
            f"{name}={text} in the environment is no number of ranks; start the ranks with torchrun"
        )
    return int(text)
