"""The agent of one node: ``python -m opt_train.agent.agent --run DIR --node NAME --slots N``.

It starts and kills ranks, keeps warm spares, and relays what the ranks say; it decides nothing. It
ignores SIGINT, SIGTERM and SIGUSR1 from birth, because schedulers send these to every process they
can find: it ends on `Leave`, when nobody has led it for `supervisor.orphan_seconds`, or by SIGKILL,
which takes its ranks along.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.outbox import Outbox
from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_slot import RankSlot, rank_environment
from opt_train.agent.snapshots.service import SnapshotService
from opt_train.config.run_config import from_json
from opt_train.host import signals
from opt_train.host.log_thread import written_beside
from opt_train.host.processes import NODE_MARK, mark_of, stat_of
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
    Relay,
)
from opt_train.protocol.facts import AgentState, GenerationGone, Heartbeat
from opt_train.protocol.framing import Message

PULSE_SECONDS = 1.0
SILENCE_SECONDS = 15.0
"""The supervisor leads every second; a link that was silent this long is dropped and dialled
anew."""
CONNECT_SECONDS = 5.0
"""A host that is gone answers nothing: TCP itself would wait for minutes."""
DIAL_SECONDS_MAX = 1.0
_DIAL_SECONDS_MIN = 0.05
_PULSE_BACKLOG_BYTES = 1 << 20
LEAVE_SECONDS = 10.0
"""Ranks that SIGKILL has not ended by then (they hang in the kernel) are left to the node's
death."""
LOG_SECONDS = 5.0
"""For the ends of the ranks' logs to reach the run directory."""
DEREGISTER_SECONDS = 2.0
"""For the registration to be taken back, before ranks are killed all the same."""

log = logging.getLogger("opt_train.agent.agent")


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What an agent is started with, and the little it reads of the run's configuration."""

    run: RunDirectory
    node: str
    slots: int
    rank_module: str
    orphan_seconds: float
    threads: int
    interface: str
    memory_every_steps: int = 0
    """Above 0: ranks take snapshots, and other agents may get them from here."""
    node_directory: str = ""
    """Where this node's disk is; empty: the folder of temporary files."""


class Agent:
    """One node's agent. `run` returns when it has left and its ranks are gone."""

    def __init__(self, options: AgentOptions, deregister: Callable[[], None]) -> None:
        """`deregister` is called when the agent begins to leave, from another thread."""
        self._options = options
        self._deregister = deregister
        self._outbox = Outbox()
        self._leader = self._first_leader = 0
        self._led_at = time.monotonic()
        self._leave = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_trouble = ""
        # For all that is read and removed in the run directory: its file system may stand still,
        # and the lease goes on.
        self._files = WorkerThread()
        run = options.run
        self._holding = SnapshotService(
            run, options.node, options.node_directory, self._outbox.tell, self._start
        )
        command = (sys.executable, "-P", "-m", options.rank_module)
        mark = {NODE_MARK: mark_of(run.path, options.node)}
        environment = rank_environment(mark, options.threads, options.interface)
        warm_logs = run.logs / "warm" / options.node
        self._logs = LogCopies(run)
        self._slots = [
            RankSlot(
                slot,
                command,
                environment,
                run,
                warm_logs,
                self._logs,
                self._outbox.tell,
                self._outbox.relay,
                self._holding.snapshot,
                self._changed.set,
            )
            for slot in range(options.slots)
        ]

    async def run(self) -> None:
        """Serve until told to leave, or until nobody has led for too long."""
        for slot in self._slots:
            slot.open()
        self._start(self._watch_lease())
        # Before the first connection: with it goes what is held, and where others get it.
        await self._holding.open(self._options.memory_every_steps > 0, self._options.interface)
        dialling = self._start(self._dial())
        await self._leave.wait()
        await self._take_registration_back()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await asyncio.gather(*(slot.close() for slot in self._slots))
                await self._holding.close()
        await asyncio.sleep(0.1)  # the last facts may still reach the supervisor
        await asyncio.to_thread(self._logs.close, LOG_SECONDS)
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
        self._files.close()

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
                if str(trouble) != self._last_trouble:
                    self._last_trouble = str(trouble)
                    log.info("no link to the supervisor: %s", trouble)
            pause = (
                _DIAL_SECONDS_MIN
                if time.monotonic() - began > 2.0
                else min(2 * pause, DIAL_SECONDS_MAX)
            )
            await asyncio.sleep(pause)

    async def _dial_once(self) -> None:
        address, secret = await self._files.do(_read_meeting, self._options.run)
        if address.leader < self._leader:
            raise LinkRefused("no supervisor has published its address")
        connection = Connection(*await dial(address.endpoint, CONNECT_SECONDS))
        try:
            await prove_agent(connection, secret, self._options.node, self._leader)
            self._led(connection.leader)
            log.info("led by supervisor %d", connection.leader)
            self._last_trouble = ""
            await self._talk(connection)
        finally:
            connection.close()

    async def _talk(self, connection: Connection) -> None:
        for slot in self._slots:
            slot.forget_pending()
        held, address = self._holding.held(), self._holding.address
        connection.send(
            AgentState(
                self._options.node,
                os.getpid(),
                self._slot_states(),
                self._leader,
                held,
                address,
                self._first_leader,
            )
        )
        caught_up = asyncio.Event()
        parts = [
            asyncio.create_task(part)
            for part in (
                self._outbox.deliver(connection, caught_up),
                self._pulse(connection, caught_up),
                self._obey(connection),
            )
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _pulse(self, connection: Connection, caught_up: asyncio.Event) -> None:
        # With the first pulse the supervisor believes that it knows all: what waited for it goes
        # before.
        await caught_up.wait()
        while True:
            if connection.unsent_bytes < _PULSE_BACKLOG_BYTES:
                connection.send(Heartbeat(self._slot_states()))
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PULSE_SECONDS):
                    await self._changed.wait()

    async def _obey(self, connection: Connection) -> None:
        while True:
            command = await connection.receive(SILENCE_SECONDS)
            if isinstance(command, LeaderLease):
                self._led(command.leader)
            elif connection.leader < self._leader:
                raise LinkRefused(
                    f"supervisor {connection.leader} has been succeeded by {self._leader}"
                )
            else:
                self._carry_out(command)

    def _led(self, leader: int) -> None:
        if leader < self._leader:
            raise LinkRefused(f"supervisor {leader} has been succeeded by {self._leader}")
        self._leader = leader
        self._first_leader = self._first_leader or leader
        self._led_at = time.monotonic()

    def _slot_states(self) -> Any:
        return tuple(slot.state() for slot in self._slots)

    # Commands -------------------------------------------------------------------------------------

    def _carry_out(self, command: Message) -> None:
        match command:
            case Begin(node=node, slot=slot) if node == self._options.node and 0 <= slot < len(
                self._slots
            ):
                self._slots[slot].begin(command)
            case Kill(generation=generation, stacks=stacks):
                self._start(self._kill(generation, stacks))
            case Relay(generation=generation, order=order):
                for rank_slot in self._slots:
                    if rank_slot.runs(generation, rank=0):
                        rank_slot.relay_order(generation, order)
            case Fetch():
                self._holding.fetch(command)
            case Drop():
                self._holding.drop(command)
            case Leave(reason=reason):
                log.info("leaving: %s", reason)
                self._leave.set()
            case Acknowledge(number=number):
                self._outbox.acknowledge(number)
            case _:
                log.error("a command that makes no sense here: %s", command)

    async def _kill(self, generation: int, stacks: bool) -> None:
        await asyncio.gather(*(slot.end(generation, stacks) for slot in self._slots))
        self._outbox.tell(GenerationGone(generation))

    async def _watch_lease(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._options.orphan_seconds / 10))
            alone = time.monotonic() - self._led_at
            if alone > self._options.orphan_seconds:
                log.error("nobody has led this node for %.0f s: leaving", alone)
                self._leave.set()
                return

    def _start(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.create_task(work)
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


def _read_meeting(run: RunDirectory) -> tuple[Address, bytes]:
    """Where the supervisor listens, and the secret. Raises `LinkRefused` or `SecretUnusable`."""
    address = read_address(run.supervisor_address)
    if address is None:
        raise LinkRefused("no supervisor has published its address")
    return address, read_secret(run.secret)


def read_options(arguments: list[str]) -> AgentOptions:
    """The options on the command line, and what the run's `config.json` adds; a plain read, without
    Hydra or torch."""
    parser = argparse.ArgumentParser(prog="python -m opt_train.agent.agent", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--node", required=True)
    parser.add_argument("--slots", type=int, required=True, help="ranks of this node")
    given = parser.parse_args(arguments)
    run = RunDirectory(given.run.resolve())
    config = from_json(run.config_json)
    cluster, checkpoint = config.cluster, config.checkpoint
    ranks_here = cluster.ranks_per_machine(given.slots * cluster.nodes)
    cores = len(os.sched_getaffinity(0))
    return AgentOptions(
        run=run,
        node=given.node,
        slots=given.slots,
        rank_module=cluster.rank_module,
        orphan_seconds=config.supervisor.orphan_seconds,
        threads=config.train.threads or max(1, cores // ranks_here),
        interface=cluster.collectives_interface,
        memory_every_steps=checkpoint.memory_every_steps,
        node_directory=checkpoint.node_directory,
    )


def hold_node(run: RunDirectory, node: str) -> Callable[[], None] | None:
    """Become the node's one agent, for the life of this process, and register; None if the node has
    one already.

    The result takes the registration back.
    """
    folder = run.nodes / node
    run.make_folder(folder)
    lock = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    registration = folder / "agent.json"
    deadline = time.monotonic() + 2 * LEAVE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # One that is leaving has taken its registration back already: wait for it.
            if registration.exists() or time.monotonic() > deadline:
                os.close(lock)
                return None
            time.sleep(0.05)
    me = stat_of(os.getpid())
    registered = {"node": node, "pid": os.getpid(), "start_ticks": me.start_ticks if me else 0}
    draft = folder / ".agent.json"
    draft.write_text(json.dumps(registered) + "\n")
    draft.replace(registration)
    return lambda: registration.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Run the agent; 0 when it left in good order, 1 when the node has one already."""
    signals.ignore()
    if os.getsid(0) != os.getpid():
        with contextlib.suppress(
            PermissionError
        ):  # a group leader that is no session leader stays where it is
            os.setsid()
    into = logging.StreamHandler()
    into.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    queued, writing = written_beside(into)
    logging.basicConfig(handlers=[queued], level=logging.INFO)
    writing.start()
    try:
        return serve(read_options(arguments))
    finally:
        stopping = threading.Thread(target=writing.stop, daemon=True)
        stopping.start()
        stopping.join(LOG_SECONDS)


def serve(options: AgentOptions) -> int:
    """Be the node's agent until it leaves; see `main`."""
    os.environ[NODE_MARK] = mark_of(options.run.path, options.node)
    deregister = hold_node(options.run, options.node)
    if deregister is None:
        log.info("node %s has an agent already", options.node)
        return 1

    async def run() -> None:
        await Agent(options, deregister).run()

    asyncio.run(run())
    log.info("left")
    return 0


if __name__ == "__main__":
    # Without the interpreter's own end, which would wait for a thread that a dead file system keeps
    # in a write.
    os._exit(main(sys.argv[1:]))
