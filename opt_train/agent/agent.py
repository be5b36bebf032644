"""The agent of one node: it starts and kills ranks, keeps warm ranks, and relays what ranks report.

It decides nothing; the supervisor's commands do. What it has of its own is a lease: whoever leads
renews it every second, and an agent that nobody has led for `supervisor.orphan_seconds` ends its
ranks and leaves, so that no allocation outlives its run. Until then its ranks train on without a
supervisor, and a new one adopts them.

On every connection the agent first sends its whole state, then what was not acknowledged, then
heartbeats; so neither side keeps track of what the other may have missed.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.outbox import Outbox
from opt_train.agent.preflight import NodePreflight
from opt_train.agent.probes.gpu import GpuProbe
from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_slot import RankSlot, rank_environment
from opt_train.agent.rank_starter import RankStarter
from opt_train.agent.snapshots.service import SnapshotService
from opt_train.host.processes import NODE_MARK, mark_of
from opt_train.host.worker_thread import WorkerThread
from opt_train.link.address import Address, read_address
from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import dial
from opt_train.link.handshake import prove_agent
from opt_train.link.secret import SecretUnusable, read_secret
from opt_train.protocol.commands import (
    Acknowledge,
    Begin,
    Drop,
    Fetch,
    Kill,
    LeaderLease,
    Leave,
    Preflight,
    Relay,
)
from opt_train.protocol.facts import (
    AgentState,
    GenerationGone,
    Heartbeat,
    PreflightEnded,
    SlotState,
)
from opt_train.protocol.framing import Message
from opt_train.run.code.frozen_code import code_environment

SILENCE_SECONDS = 15.0
"""The supervisor renews the lease every second; a link that was silent this long is dropped and
dialled anew."""
CONNECT_SECONDS = 5.0
"""A host that is gone answers nothing: TCP itself would wait for minutes."""
DIAL_SECONDS_MAX = 1.0
_DIAL_SECONDS_MIN = 0.05
_LASTING_LINK_SECONDS = 2.0
"""After a link that lasted this long the next one is dialled at once, without a longer pause."""
_HEARTBEAT_BACKLOG_BYTES = 1 << 20
"""With more unsent, heartbeats are left out: they would be old when they arrive."""
LEAVE_SECONDS = 10.0
"""Ranks that SIGKILL has not ended by then (they hang in the kernel) are left to the node's
death."""
LAST_FACTS_SECONDS = 0.1
"""For the last facts to reach the supervisor, where one is connected."""
LOG_SECONDS = 5.0
"""For the ends of the ranks' logs to reach the run directory."""
DEREGISTER_SECONDS = 2.0
"""For the registration to be taken back, before ranks are killed all the same."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What an agent is started with, and the little it reads of the run's configuration."""

    run: RunDirectory
    node: str
    slots: int
    rank_module: str
    orphan_seconds: float
    threads: int
    """Of each rank."""
    interface: str
    """Network interface of the collectives and of transfers between agents; empty: the library's
    choice."""
    code: Path | None = None
    """The folder of packages that ranks run from; None: as the agent."""
    cores: tuple[frozenset[int], ...] = ()
    """Of each slot's ranks, as `core_binding` says; empty: they run wherever the agent may."""
    memory_every_steps: int = 0
    """Above 0: ranks take snapshots, and other agents may get them from here."""
    node_directory: str = ""
    """Where this node's disk is; empty: the folder of temporary files."""
    preflight: tuple[str, ...] = ()
    """The command that tests the node."""
    preflight_seconds: float = 0.0
    """How long that may take."""
    heartbeat_seconds: float = 1.0
    give_back: tuple[str, ...] = ()
    """The command that gives the node's allocation back, for an agent that leaves because nobody
    leads it; empty: there is nothing to give back."""


class Agent:
    """One node's agent. `run` returns when it has left and its ranks are gone."""

    def __init__(self, options: AgentOptions, deregister: Callable[[], None]) -> None:
        """`deregister` is called when the agent begins to leave, from another thread."""
        self._options = options
        self._deregister = deregister
        self._outbox = Outbox()
        self._gpu_probe = GpuProbe(self._outbox.add)
        self._leader = self._first_leader = 0
        self._lease_renewed = time.monotonic()
        self._leave = asyncio.Event()
        self._orphaned = False
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_trouble = ""
        # For all that is read and removed in the run directory: its file system may stand still,
        # and the lease goes on.
        self._files = WorkerThread()
        run = options.run
        self._snapshots = SnapshotService(
            run, options.node, options.node_directory, self._outbox.add, self._start
        )
        self._preflight = NodePreflight(
            options.preflight, options.preflight_seconds, self._outbox.add, self._start
        )
        mark = {NODE_MARK: mark_of(run.path, options.node), **code_environment(options.code)}
        environment = rank_environment(mark, options.threads, options.interface)
        warm_logs = run.logs / "warm" / options.node
        self._logs = LogCopies(run)
        self._starter = RankStarter(options.rank_module, environment, self._logs, warm_logs)
        self._slots = [
            RankSlot(
                slot,
                self._starter,
                run,
                warm_logs,
                self._logs,
                cores=options.cores[slot] if options.cores else (),
                add_fact=self._outbox.add,
                add_metrics=self._outbox.add_metrics,
                keep_snapshot=self._snapshots.keep,
                changed=self._changed.set,
            )
            for slot in range(options.slots)
        ]

    async def run(self) -> None:
        """Serve until ordered to leave, or until nobody has led for too long."""
        for slot in self._slots:
            slot.open()
        self._start(self._watch_lease())
        watching = self._start(self._gpu_probe.run())
        # Before the first connection: with it goes what snapshots there are, and where others get
        # them.
        await self._snapshots.open(self._options.memory_every_steps > 0, self._options.interface)
        dialling = self._start(self._dial())
        await self._leave.wait()
        # First of all: an agent that is started in this one's place then waits for the node's lock.
        await self._take_registration_back()
        self._preflight.stop("the agent leaves")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                closing = [asyncio.create_task(slot.close()) for slot in self._slots]
                # After them: ranks that are only asked for end with it.
                closing.append(asyncio.create_task(self._starter.close()))
                await asyncio.gather(*closing)
                await self._snapshots.close()
        await asyncio.sleep(LAST_FACTS_SECONDS)
        await asyncio.to_thread(self._logs.close, LOG_SECONDS)
        for task in (dialling, watching):
            task.cancel()
        await asyncio.gather(dialling, watching, return_exceptions=True)
        self._files.close()
        if self._orphaned and self._options.give_back:
            await self._give_back(self._options.give_back)

    async def _give_back(self, command: tuple[str, ...]) -> None:
        """No allocation outlives its run (invariant 9). The last thing an agent does: what ends the
        allocation ends the agent too."""
        log.error("giving the allocation back: %s", " ".join(command))
        try:
            # As long as the command tries: it would die with this process.
            giving = await asyncio.create_subprocess_exec(*command)
            await giving.wait()
        except OSError as trouble:
            log.error("the allocation was not given back: %s", trouble)

    async def _take_registration_back(self) -> None:
        try:
            async with asyncio.timeout(DEREGISTER_SECONDS):
                await self._files.do(self._deregister)
        except (OSError, TimeoutError) as trouble:
            log.error(
                "the node stays registered: %s", str(trouble) or "the run directory does not answer"
            )

    # Link -----------------------------------------------------------------------------------------

    async def _dial(self) -> None:
        pause = _DIAL_SECONDS_MIN
        while True:
            began = time.monotonic()
            try:
                await self._dial_once()
            except (LinkRefused, SecretUnusable, OSError, TimeoutError) as trouble:
                # Once a trouble: a night without a supervisor must not fill the log.
                if str(trouble) != self._last_trouble:
                    self._last_trouble = str(trouble)
                    log.info("no link to the supervisor: %s", trouble)
            if time.monotonic() - began > _LASTING_LINK_SECONDS:
                pause = _DIAL_SECONDS_MIN
            else:
                pause = min(2 * pause, DIAL_SECONDS_MAX)
            await asyncio.sleep(pause)

    async def _dial_once(self) -> None:
        address, secret = await self._files.do(_read_address_and_secret, self._options.run)
        if address.leader < self._leader:
            raise LinkRefused("no supervisor has published its address")
        connection = Connection(*await dial(address.endpoint, CONNECT_SECONDS))
        try:
            await prove_agent(connection, secret, self._options.node, self._leader)
            self._renew_lease(connection.leader)
            log.info("led by supervisor %d", connection.leader)
            self._last_trouble = ""
            await self._use(connection)
        finally:
            connection.close()

    async def _use(self, connection: Connection) -> None:
        for slot in self._slots:
            slot.forget_pending()
        connection.send(
            AgentState(
                self._options.node,
                os.getpid(),
                self._slot_states(),
                self._leader,
                self._snapshots.files(),
                self._snapshots.address,
                self._first_leader,
                self._gpu_probe.gpus,
            )
        )
        caught_up = asyncio.Event()
        parts = [
            asyncio.create_task(part)
            for part in (
                self._outbox.deliver(connection, caught_up),
                self._send_heartbeats(connection, caught_up),
                self._receive_commands(connection),
            )
        ]
        try:
            # All three end with the connection; whichever notices first says why.
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _send_heartbeats(self, connection: Connection, caught_up: asyncio.Event) -> None:
        # With the first heartbeat the supervisor believes that it knows all: what waited for it
        # goes before.
        await caught_up.wait()
        while True:
            if connection.unsent_bytes < _HEARTBEAT_BACKLOG_BYTES:
                connection.send(Heartbeat(self._slot_states()))
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.heartbeat_seconds):
                    await self._changed.wait()

    async def _receive_commands(self, connection: Connection) -> None:
        while True:
            command = await connection.receive(SILENCE_SECONDS)
            if isinstance(command, LeaderLease):
                self._renew_lease(command.leader)
            elif connection.leader < self._leader:
                raise LinkRefused(
                    f"supervisor {connection.leader} has been succeeded by {self._leader}"
                )
            else:
                self._execute(command)

    def _renew_lease(self, leader: int) -> None:
        if leader < self._leader:
            raise LinkRefused(f"supervisor {leader} has been succeeded by {self._leader}")
        self._leader = leader
        self._first_leader = self._first_leader or leader
        self._lease_renewed = time.monotonic()

    def _slot_states(self) -> tuple[SlotState, ...]:
        return tuple(slot.state() for slot in self._slots)

    # Commands -------------------------------------------------------------------------------------

    def _execute(self, command: Message) -> None:
        match command:
            case Begin(node=node, slot=slot) if node == self._options.node and 0 <= slot < len(
                self._slots
            ):
                # Ranks never wait for a test.
                self._preflight.stop("ranks begin here")
                self._slots[slot].begin(command)
            case Kill(generation=generation, stacks=stacks):
                self._start(self._kill(generation, stacks))
            case Relay(generation=generation, order=order):
                # Orders go to rank 0 alone; the step stats carry them from there, so that all ranks
                # obey at the same step.
                for rank_slot in self._slots:
                    if rank_slot.runs(generation, rank=0):
                        rank_slot.relay_order(generation, order)
            case Fetch():
                self._snapshots.fetch(command)
            case Drop():
                self._snapshots.drop(command)
            case Preflight() if any(slot.is_busy for slot in self._slots):
                self._outbox.add(PreflightEnded(0, 0, 0.0, "ranks run here"))
            case Preflight():
                self._preflight.begin()
            case Leave(reason=reason):
                log.info("leaving: %s", reason)
                self._leave.set()
            case Acknowledge(number=number):
                self._outbox.acknowledge(number)
            case _:
                log.error("a command that makes no sense here: %s", command)

    async def _kill(self, generation: int, stacks: bool) -> None:
        await asyncio.gather(*(slot.end(generation, stacks) for slot in self._slots))
        self._outbox.add(GenerationGone(generation))

    async def _watch_lease(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._options.orphan_seconds / 10))
            orphaned_seconds = time.monotonic() - self._lease_renewed
            if orphaned_seconds > self._options.orphan_seconds:
                log.error("nobody has led this node for %.0f s: leaving", orphaned_seconds)
                self._orphaned = True
                self._leave.set()
                return

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Nothing here may fail quietly: an agent that lost a part of itself leaves, and its
            # ranks with it.
            log.critical("the agent is broken", exc_info=task.exception())
            self._leave.set()


def _read_address_and_secret(run: RunDirectory) -> tuple[Address, bytes]:
    """Where the supervisor listens, and the secret. Raises `LinkRefused` or `SecretUnusable`."""
    address = read_address(run.supervisor_address)
    if address is None:
        raise LinkRefused("no supervisor has published its address")
    return address, read_secret(run.secret)
