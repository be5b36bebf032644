"""One supervisor's life on an event loop: every input of the core and every effect that it
asks for goes through here.

It decides nothing. If the core or the shell itself fails, it says so and goes at once: the ranks
train on, a supervisor that is started within `supervisor.orphan_seconds` adopts them, and after
that the agents end them and leave.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from opt_logbook.record import inbox
from opt_logbook.record.events import Entry, IncidentClosed
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock, LockLost
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import Cluster, NodeState
from opt_train.faults.plan import FaultPlan
from opt_train.host import signals
from opt_train.link.address import Address, publish, read_address
from opt_train.link.endpoint import remove_endpoint
from opt_train.protocol.commands import Leave
from opt_train.protocol.exits import PERSON_MUST_DECIDE, TERMINATED
from opt_train.protocol.interventions import INTERVENE
from opt_train.run.checkpoint_keeper import CheckpointKeeper
from opt_train.run.hold import HOLD, RESUME
from opt_train.run.report.live_status import publish_status
from opt_train.run.state import NODES_END
from opt_train.supervisor.effects import Effect, Finish, Show
from opt_train.supervisor.inputs import (
    AgentConnected,
    AgentDisconnected,
    ClusterObserved,
    Identity,
    InboxReceived,
    Input,
    Now,
    StopAsked,
    Tick,
)
from opt_train.supervisor.shell.agent_server import AgentServer
from opt_train.supervisor.shell.batch_reader import alarm_of, read_batch
from opt_train.supervisor.shell.effect_runner import EffectRunner
from opt_train.supervisor.shell.lemon_record import LemonRecord
from opt_train.supervisor.shell.status_line import StatusLine

TICK_SECONDS = 0.2
SHOW_SECONDS = 1.0
"""Between two files that say what is shown."""
INBOX_SECONDS = 0.5
OBSERVE_SECONDS = 1.0
LOCK_SECONDS = 5.0
DYING_SECONDS = 0.1
"""From the end of a dying agent's link to the end of its process; then the cluster is asked at
once."""
LEAVE_SECONDS = 8.0
"""Agents that have not left by then are fenced."""
_TEXTS = {
    "note": ("author", "text"),
    "stop": ("by",),
    HOLD: ("by", "reason"),
    RESUME: ("by",),
    INTERVENE: ("by", "why"),
}
"""What may lie in the inbox: kind and the texts it must have."""

log = logging.getLogger(__name__)


class SupervisorEnded(Exception):
    """The scheduler ends the supervisor's job, and the ranks are to train on."""


class Core(Protocol):
    """The sans-I/O supervisor (core.py)."""

    def begin(self, now: Now) -> list[Effect]:
        """What to do first."""

    def handle_all(self, inputs: Sequence[Input], now: Now, /) -> list[Effect]:
        """What to do about inputs, in the order in which they came."""

    @property
    def goes_on_after_stop(self) -> bool:
        """Whether the run stops, and is then taken up again by itself."""


class EventLoop:
    """Holds the links, feeds the core, carries out its effects. The caller holds lock and
    journal."""

    def __init__(
        self,
        run: RunDirectory,
        lock: Lock,
        journal: Journal,
        cluster: Cluster,
        plan: FaultPlan,
        core: Core,
        identity: Identity,
        status: StatusLine,
        secret: bytes,
        lemons: LemonRecord,
        lease_seconds: float = 1.0,
    ) -> None:
        self._run, self._lock, self._cluster, self._plan = run, lock, cluster, plan
        self._core, self._identity, self._status = core, identity, status
        self._endpoint = cluster.make_endpoint()
        self._server = AgentServer(
            self._endpoint, secret, identity.leader, identity.nodes, self.feed, lease_seconds
        )
        self._effects = EffectRunner(
            journal,
            MetricsWriter(run),
            self._server,
            cluster,
            CheckpointKeeper(run, lock, identity.config_sha256),
            lemons,
            self.feed,
            self._show,
            status.add_line,
            self._durable,
        )
        self._shown: Show | None = None
        self._arrived: list[Input] = []
        """Inputs that the core is given at the next turn of the loop."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken: BaseException | None = None
        self._over = asyncio.Event()
        self._lost_link = asyncio.Event()
        self._fed: set[Path] = set()
        self._rendering: asyncio.subprocess.Process | None = None
        self.recalled: Input | None = None
        """The core's first input: what was known when the supervisor before died."""

    async def run(self) -> Finish:
        """Supervise to the end. A failure of the supervisor itself is an end too, with code 3."""
        try:
            finish = await self._supervise()
            await self._dismiss(finish.message)
        except Exception as error:
            finish = self._failure(error)
        finally:
            self._over.set()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.stop()
            remove_endpoint(self._endpoint)
            if self._rendering is not None and self._rendering.returncode is None:
                self._rendering.kill()
                await self._rendering.wait()
            await self._effects.settle(LEAVE_SECONDS)
        return finish

    def feed(self, input_: Input) -> None:
        """Give `input_` to the core, together with all that arrives in this turn of the loop."""
        if self._over.is_set():
            return
        # Where thousands of agents dial in at once, one decision serves all that has come; where
        # little comes, each input has its own, and none waits.
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._decide)
        self._arrived.append(input_)
        if isinstance(input_, AgentDisconnected):
            self._lost_link.set()

    def _decide(self) -> None:
        """Have the core decide on what has arrived, and queue what it wants done."""
        inputs, self._arrived = self._arrived, []
        if self._over.is_set() or not inputs:
            return
        try:
            for input_ in inputs:
                if isinstance(input_, AgentConnected):
                    self._effects.forget_sends(input_.node)
            self._effects.queue(self._core.handle_all(inputs, _now()))
            faults = [fault for fault in map(self._plan.due, inputs) if fault is not None]
        except Exception as error:
            self._break(error)
            return
        for fault in faults:
            self._start(asyncio.to_thread(self._plan.do, fault, self._cluster))

    # Supervising ----------------------------------------------------------------------------------

    async def _supervise(self) -> Finish:
        log.info("supervisor %d, process %d, begins", self._identity.leader, os.getpid())
        older = read_address(self._run.supervisor_address)
        if older is not None:  # its supervisor is gone: we hold the lock
            remove_endpoint(older.endpoint)
        bound = await self._server.start()
        # Published once somebody listens there: agents dial at once, and back off when refused.
        publish(self._run.supervisor_address, Address(bound, self._identity.leader))
        loop = asyncio.get_running_loop()
        for number in signals.ASK_TO_STOP:
            loop.add_signal_handler(number, partial(self.feed, StopAsked(number.name)))
        loop.add_signal_handler(signal.SIGINT, self._asked_by_hand)
        if self._cluster.outlives_supervisor:
            loop.add_signal_handler(signal.SIGTERM, self._leave_ranks)
        running = self._start(self._effects.run())
        self._effects.queue(self._core.begin(_now()))
        if self.recalled is not None:
            self._effects.queue(self._core.handle_all((self.recalled,), _now()))
        self._effects.then(
            lambda: self._start(self._observe())
        )  # agents that were just started are seen as such
        self._start(self._tick())
        self._start(self._read_inbox())
        self._start(self._watch_lock())
        self._start(self._publish_shown())
        over = self._start(self._over.wait())
        await asyncio.wait((running, over), return_when=asyncio.FIRST_COMPLETED)
        if self._broken is not None:
            raise self._broken
        finish: Finish = running.result()
        log.info("finished with code %d: %s", finish.code, finish.message)
        return finish

    def _asked_by_hand(self) -> None:
        """Stop the run. Where it stops by itself, to go on with other nodes, the wish is left in
        the inbox, for whoever takes it up again."""
        if self._core.goes_on_after_stop:
            self._start(self._keep_stop())
        else:
            self.feed(StopAsked(signal.SIGINT.name))

    async def _keep_stop(self) -> None:
        message = {"kind": "stop", "by": signal.SIGINT.name}
        try:
            await asyncio.to_thread(inbox.drop, self._run, message)
        except OSError as error:
            log.error("the run goes on with other nodes: the stop cannot be kept (%s)", error)

    def _leave_ranks(self) -> None:
        """End this supervisor and nothing else: the next one adopts the ranks, or the agents end
        them."""
        log.info("SIGTERM: the scheduler ends this job; the ranks train on")
        self._break(SupervisorEnded())

    async def _tick(self) -> None:
        while True:
            self.feed(Tick())
            await asyncio.sleep(TICK_SECONDS)

    async def _observe(self) -> None:
        stopping = False
        while True:
            # Off the loop: a cluster's controller may answer late, and the leases go on meanwhile.
            seen = await asyncio.to_thread(self._cluster.observe)
            self._server.allow(seen)
            states = {node: view.state for node, view in seen.items()}
            reasons = {node: view.reason for node, view in seen.items() if view.reason}
            draining = {node: view.draining for node, view in seen.items() if view.draining}
            taken_back = frozenset(node for node, view in seen.items() if view.taken_back)
            self.feed(ClusterObserved(states, reasons, draining, taken_back))
            if self._cluster.ends_soon and not stopping:
                stopping = True
                self.feed(StopAsked(NODES_END))
            self._lost_link.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OBSERVE_SECONDS):
                    await self._lost_link.wait()
                    await asyncio.sleep(DYING_SECONDS)

    def _show(self, show: Show) -> None:
        self._shown = show
        self._status.show(show)

    async def _publish_shown(self) -> None:
        published: Show | None = None
        while True:
            shown = self._shown
            if shown is not None and shown != published:
                published = shown
                # On a full disk whoever looks sees what was shown before.
                with contextlib.suppress(OSError):
                    values = asdict(shown)
                    await asyncio.to_thread(
                        publish_status, self._run, self._identity.leader, values
                    )
            await asyncio.sleep(SHOW_SECONDS)

    async def _watch_lock(self) -> None:
        """A supervisor that was cut off may have been succeeded, and have nothing to journal that
        would tell it so: it would stay for ever. And agents that it does not reach see by the lock
        that somebody leads."""
        while True:
            await asyncio.sleep(LOCK_SECONDS)
            # A file system that cannot be read says nothing.
            with contextlib.suppress(OSError):
                if not await asyncio.to_thread(self._lock.is_mine):
                    raise LockLost(f"{self._run.lock} names another process")
                await asyncio.to_thread(self._lock.touch)

    async def _read_inbox(self) -> None:
        while True:
            for dropped in await asyncio.to_thread(self._waiting_messages):
                if dropped.path in self._fed:
                    continue
                # A person's stop ends the run for good: it is for whoever takes it up again.
                if dropped.message["kind"] == "stop" and self._core.goes_on_after_stop:
                    continue
                self._fed.add(dropped.path)
                texts = _TEXTS.get(dropped.message["kind"], ("",))
                if all(isinstance(dropped.message.get(text), str) for text in texts):
                    self.feed(InboxReceived(dropped.message))
                    # Now: what comes of it must be queued in front of its removal.
                    self._decide()
                else:
                    log.warning("%s is no message a supervisor takes", dropped.path.name)
                # It is removed when what came of it is durable; a supervisor that dies before that
                # finds it again.
                self._effects.then(partial(self._remove, dropped))
            await asyncio.sleep(INBOX_SECONDS)

    def _waiting_messages(self) -> list[inbox.Dropped]:
        try:
            return inbox.waiting(self._run)
        except OSError as error:
            # A sick file system is no reason to leave the ranks without a leader.
            log.warning("the inbox cannot be read: %s", error)
            return []

    def _remove(self, dropped: inbox.Dropped) -> None:
        try:
            dropped.remove()
        except OSError as error:
            # It stays among the messages that were fed: fed again twice a second, it would fill
            # the journal.
            log.warning("%s cannot be removed: %s", dropped.path.name, error)
        else:
            self._fed.discard(dropped.path)

    def _durable(self, entry: Entry) -> None:
        log.info("journal %d: %s", entry.seq, type(entry.event).__name__)
        rendering = self._rendering is not None and self._rendering.returncode is None
        if isinstance(entry.event, IncidentClosed) and not rendering:
            self._start(self._render())
        if (alarm := alarm_of(entry)) and entry.step is not None:
            self._start(self._read_batch(entry.attempt, entry.step, alarm))

    async def _read_batch(self, attempt: str, step: int, alarm: str) -> None:
        try:
            read = await read_batch(self._run, attempt, step, alarm)
        # For a reader's sake alone: nothing of it may end a supervisor.
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("the batch of step %d could not be read: %s", step, error)
            return
        if read is not None:
            self.feed(read)

    async def _render(self) -> None:
        """Bring the chronicle up to date, in a process that gives way to the ranks."""
        # A Ctrl-C at the terminal reaches its whole process group, and is meant for the run alone.
        with signals.blocked():
            self._rendering = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "opt_logbook.cli", "render", str(self._run.path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, self._rendering.pid, 19)
        if await self._rendering.wait() != 0:
            log.warning(
                "the chronicle could not be rendered; try: logbook render %s", self._run.path
            )

    # Ending ---------------------------------------------------------------------------------------

    async def _dismiss(self, reason: str) -> None:
        """Have every agent leave, and fence what stays: no allocation outlives its run."""
        self._over.set()
        # An agent that has not dialled in yet has nothing to lose: it is fenced at once.
        leaving = tuple(self._server.connected)
        for node in leaving:
            self._server.send(node, Leave(reason))
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            seen = await asyncio.to_thread(self._cluster.observe)
            if all(seen[node].state != NodeState.UP for node in leaving):
                break
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._cluster.release)

    def _failure(self, error: Exception) -> Finish:
        if isinstance(error, SupervisorEnded):
            return Finish(
                TERMINATED,
                "the supervisor's job ends; its ranks train on for supervisor.orphan_seconds: "
                "start it again within that time, or the agents end them and give the nodes back",
            )
        if isinstance(error, LockLost) and not self._run.lock.exists():
            return Finish(
                PERSON_MUST_DECIDE,
                f"{self._run.path} was removed, or its file system is gone; nothing can be saved "
                "any more, and its "
                "ranks end when nobody has led them for supervisor.orphan_seconds",
            )
        if isinstance(error, LockLost):
            log.error("succeeded by another supervisor: %s", error)
            return Finish(
                PERSON_MUST_DECIDE,
                "another process has taken the run; this supervisor leaves it alone",
            )
        log.critical("the supervisor is broken", exc_info=error)
        published = read_address(self._run.supervisor_address)
        if published is not None and published.leader == self._identity.leader:  # not a successor's
            self._run.supervisor_address.unlink(missing_ok=True)
        return Finish(
            PERSON_MUST_DECIDE,
            f"the supervisor failed ({type(error).__name__}: {error}); logs/supervisor.log has "
            "the details. "
            "Start the same command again soon and it goes on where it was; else the agents end "
            "the ranks and leave.",
        )

    def _break(self, error: BaseException) -> None:
        if self._broken is None:
            self._broken = error
        self._over.set()

    def _start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._break(error)


def _now() -> Now:
    return Now(wall=time.time(), monotonic=time.monotonic())
