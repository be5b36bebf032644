"""The way in: take the run's lock, fold its journal, supervise until it rests, tell the story."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from opt_logbook.record import inbox, metrics
from opt_logbook.record.events import Entry, Event, RunCreated
from opt_logbook.record.hardware import Offence
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock, LockHeld
from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import Cluster
from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.run_config import RunConfig, sha256_of
from opt_train.faults.plan import FaultPlan
from opt_train.host import signals
from opt_train.link.secret import SecretUnusable, ensure_secret
from opt_train.protocol.exits import PERSON_MUST_DECIDE, STOPPED, BadInput
from opt_train.run.admission import damage_question
from opt_train.run.fold import fold
from opt_train.run.hold import refusal
from opt_train.run.hold_requests import hold_in_force, journal_holds
from opt_train.run.lemons import worst_first
from opt_train.run.state import RunState
from opt_train.stability.metric_history import HISTORY_STEPS
from opt_train.supervisor.core import Supervisor
from opt_train.supervisor.inputs import Identity, MetricsRecalled
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.shell.event_loop import Core, EventLoop
from opt_train.supervisor.shell.lemon_record import LemonRecord, lemon_folder
from opt_train.supervisor.shell.status_line import StatusLine, printable
from opt_train.supervisor.shell.supervisor_log import SupervisorLog

MakeCore = Callable[[RunConfig, RunState, Identity], Core]

log = logging.getLogger(__name__)


def supervise(
    config: RunConfig,
    run: RunDirectory,
    created: RunCreated,
    *,
    opens_lineage: bool = False,
    lineage_difference: tuple[str, ...] = (),
    operational_difference: tuple[str, ...] = (),
    git_commit: str = "",
    git_dirty: bool = False,
    packages: Mapping[str, str] | None = None,
    code: Path | None = None,
    code_sha256: str = "",
    supervisor_difference: tuple[str, ...] = (),
    write_configuration: Callable[[], None] = lambda: None,
    make_core: MakeCore = Supervisor,
    stream: TextIO = sys.stdout,
) -> int:
    """Supervise the run until it is finished, stopped, or a person must decide; returns the exit
    code.

    Where the nodes' time limit stops it, or too few nodes are left, it waits for others and goes
    on. Call it from the main thread. `write_configuration` is called once the run is held, so that
    nobody else's run can change under it; behind it the run directory holds `config.json`, and
    `code` the packages from which agents and ranks run (None: the installation's). `make_core`
    replaces what decides; tests use it.

    Raises:
        BadInput: another process has the run, the fault plan is wrong, or the run directory cannot
            be written or read.
    """
    # In front of the lock: a misspelt plan has touched nothing.
    plan = FaultPlan(config.faults, run.faults)
    identity = Identity(
        leader=0,  # known once the journal is folded, and so are the nodes
        nodes=(),
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version("opt-train"),
        run_directory=str(run.path),
        config_path=str(run.config_json),
        config_sha256=sha256_of(config),
        created=created,
        opens_lineage=opens_lineage,
        lineage_difference=lineage_difference,
        operational_difference=operational_difference,
        git_commit=git_commit,
        git_dirty=git_dirty,
        packages=dict(packages or {}),
        code_sha256=code_sha256,
        supervisor_difference=supervisor_difference,
    )
    while True:
        exit_code, other_nodes = _lead(
            config, run, code, plan, identity, write_configuration, make_core, stream
        )
        if not other_nodes:
            return exit_code
        _print("its nodes are given back; asking for others", stream)
        # What was new with this start is on record by now.
        identity = replace(
            identity, opens_lineage=False, lineage_difference=(), operational_difference=()
        )
        write_configuration = _nothing


def _nothing() -> None:
    """The configuration is written already."""


def _lead(
    config: RunConfig,
    run: RunDirectory,
    code: Path | None,
    plan: FaultPlan,
    identity: Identity,
    write_configuration: Callable[[], None],
    make_core: MakeCore,
    stream: TextIO,
) -> tuple[int, bool]:
    """Supervise with one set of nodes; returns the exit code, and whether it goes on as soon as
    there are others: their time is over, or too few are left."""
    try:
        with Lock.acquire(run) as lock:
            write_configuration()
            with SupervisorLog(run.logs / "supervisor.log"), Journal.open(run, lock) as journal:
                state = _folded(journal)
                question = damage_question(run, journal.repairs)
                if question:
                    # Journalled by now, so that the next start is a person's yes.
                    _print(question, stream)
                    return PERSON_MUST_DECIDE, False
                cluster = make_cluster(config.cluster, run, code)
                if state.created is None:
                    # The folder was perhaps removed under a run whose agents live: none of them may
                    # meet this one.
                    cluster.release()
                # From here on a predecessor that wakes up reads a number above its own, and commits
                # nothing; and whoever wants to stop the wait for nodes finds a supervisor.
                lock.set_leader(state.leader + 1)
                state = _with_holds(journal, state, run)
                hold = hold_in_force(run, state.hold)
                # Ranks that an earlier supervisor left are led once more, to save and stop.
                if hold is not None and not cluster.living_agents():
                    _print(refusal(hold, run.path), stream)
                    return STOPPED, False
                record = LemonRecord(lemon_folder(config, run))
                offences = _offences_elsewhere(config, record, state)
                avoided = _avoided(config, offences)
                if not _acquired(cluster, run, lock, state, avoided, stream):
                    _print(_why_without_nodes(journal, state, run), stream)
                    return STOPPED, False
                if identity.opens_lineage:
                    # They and their warm ranks run the code of the lineage before.
                    for node in cluster.living_agents():
                        cluster.fence(node)
                identity = replace(
                    identity,
                    leader=lock.leader,
                    nodes=cluster.node_names,
                    topology=cluster.topology,
                    offences=offences,
                )
                secret = ensure_secret(run.secret)
                core = make_core(config, state, identity)
                status = StatusLine(stream, config.supervisor.status_seconds)
                try:
                    event_loop = EventLoop(
                        run,
                        lock,
                        journal,
                        cluster,
                        plan,
                        core,
                        identity,
                        status,
                        secret,
                        record,
                        config.cluster.heartbeat_seconds,
                    )
                    event_loop.recalled = _recalled(run, state)
                    finish = asyncio.run(event_loop.run())
                finally:
                    status.close()
                last = core.state if isinstance(core, Supervisor) else RunState()
                goes_on = finish.code == STOPPED and _goes_on(journal, last, run)
    except (LockHeld, SecretUnusable) as error:
        raise BadInput(str(error)) from None
    except OSError as error:
        raise BadInput(
            f"{error.filename or run.path}: {error.strerror or error}; mend it and start again"
        ) from None
    _render_chronicle(run, stream)
    _print(f"stopped by {last.stopped_by}" if goes_on else finish.message, stream)
    return finish.code, goes_on


def _offences_elsewhere(
    config: RunConfig, record: LemonRecord, state: RunState
) -> tuple[Offence, ...]:
    """What nodes were taken out of other runs for, where a node's name is a machine's."""
    if not config.cluster.names_machines:
        return ()
    return record.read_others(state.created.name if state.created else "", state.created_time)


def _avoided(config: RunConfig, offences: tuple[Offence, ...]) -> tuple[str, ...]:
    """Nodes so bad that others are asked for, the worst first."""
    keys = config.supervisor
    if not keys.lemon_exclude_score or keys.mode != Mode.ACT:
        return ()
    return worst_first(offences, time.time(), keys.lemon_half_life_days, keys.lemon_exclude_score)


def _with_holds(journal: Journal, state: RunState, run: RunDirectory) -> RunState:
    """The state once a hold or a resume that waits in the inbox is on record; a run that has no
    first line yet leaves it there."""

    def append(event: Event) -> None:
        nonlocal state
        attempt = state.attempt.name if state.attempt is not None else ""
        entry = Entry(round(time.time(), 3), attempt, None, event)
        state = fold(state, journal.append(entry))

    if state.created is not None:
        journal_holds(run, state.hold, append)
    return state


def _goes_on(journal: Journal, state: RunState, run: RunDirectory) -> bool:
    """Whether the run that has come to rest is taken up again at once; what was asked of it on its
    way down counts."""
    # An inbox that cannot be read, or a full disk, changes nothing about how the run came to rest.
    with contextlib.suppress(OSError):
        stopped = _take_stops(run)
        return not stopped and _with_holds(journal, state, run).goes_on_by_itself
    return state.goes_on_by_itself


def _why_without_nodes(journal: Journal, state: RunState, run: RunDirectory) -> str:
    """Why the wait for nodes is over."""
    hold = hold_in_force(run, _with_holds(journal, state, run).hold)
    if hold is not None:
        return refusal(hold, run.path)
    return "stopped before there were nodes; nothing has been started"


def _take_stops(run: RunDirectory) -> bool:
    """Whether requests to stop waited; they are obeyed, and gone."""
    stops = [m for m in inbox.waiting(run) if m.message["kind"] == "stop"]
    for message in stops:
        message.remove()
    return bool(stops)


def _acquired(
    cluster: Cluster,
    run: RunDirectory,
    lock: Lock,
    state: RunState,
    avoided: tuple[str, ...],
    stream: TextIO,
) -> bool:
    """Wait for the nodes; False: somebody asked to stop, or to hold the run, first."""

    def was_asked_to_rest() -> bool:
        # Days may go by: whoever looks from another host sees by the lock that somebody waits.
        with contextlib.suppress(OSError):
            lock.touch()
        stops = _take_stops(run)
        # With a hold in force the nodes are those of ranks that are to save.
        held = state.hold is None and hold_in_force(run, None) is not None
        return stops or held

    failed = [name for name, node in state.nodes.items() if node.role == "failed"]
    with signals.noted() as came:
        return cluster.acquire(
            failed,
            announce=lambda sentence: _print(sentence, stream),
            stopped=lambda: came() or was_asked_to_rest(),
            avoided=avoided,
        )


def _recalled(run: RunDirectory, state: RunState) -> MetricsRecalled | None:
    """The newest lines that the supervisor before filed of the attempt that may still live, and of
    those that it descends from: where training was, and how it came there."""
    live = state.live
    if live is None:
        return None
    of_attempt = metrics.newest_lines(run, live.name, HISTORY_STEPS)
    before: list[Mapping[str, Any]] = []
    name, limit = state.history.get(live.name, ("", 0))
    while name and len(before) + len(of_attempt) < HISTORY_STEPS:
        missing = HISTORY_STEPS - len(before) - len(of_attempt)
        before = [*metrics.newest_lines(run, name, missing, limit), *before]
        # A parent's steps beyond its child's start are no part of the chain.
        name, start = state.history.get(name, ("", 0))
        limit = min(limit, start)
    return MetricsRecalled(tuple(before), tuple(of_attempt))


def _folded(journal: Journal) -> RunState:
    """The state that the journal tells, after its repairs have been journalled."""
    state, attempt = RunState(), ""
    for entry in journal.entries:
        state, attempt = fold(state, entry), entry.attempt or attempt
    for repair in journal.repairs:
        log.warning("the journal needed mending: %s", repair)
        state = fold(state, journal.append(Entry(round(time.time(), 3), attempt, None, repair)))
    return state


def _render_chronicle(run: RunDirectory, stream: TextIO) -> None:
    if (
        not run.journal.exists()
    ):  # the run was removed; a chronicle of nothing must not make its folder again
        return
    try:
        # Plotting is loaded when there is something to plot.
        from opt_logbook.render.render import render  # noqa: PLC0415

        render(run)
    # A picture that cannot be drawn, or that nobody wants to wait for, must not change what the run
    # came to.
    except (Exception, KeyboardInterrupt) as error:
        why = str(error) or type(error).__name__
        _print(f"the chronicle was not rendered ({why}); try: logbook render {run.path}", stream)


def _print(sentence: str, stream: TextIO) -> None:
    try:
        print(printable(sentence), file=stream, flush=True)
    except OSError:
        log.info("nobody reads the terminal any more")
