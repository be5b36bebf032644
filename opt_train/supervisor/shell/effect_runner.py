"""Carries out the core's effects, in the order given, with `Append` as a barrier that stalls nobody
but them.

One thread appends. While it waits for a sick file system the event loop goes on: leases, heartbeats
and the status line do not wait for it, but everything the core decided after the entry does.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from opt_logbook.record.events import Entry, JournalStalled
from opt_logbook.record.journal import Head
from opt_logbook.record.metrics import MetricsWriter

from opt_train.clusters.cluster import Cluster
from opt_train.protocol.commands import Acknowledge, Begin
from opt_train.protocol.framing import Message
from opt_train.run.checkpoint_keeper import CheckpointKeeper, CommitResult
from opt_train.supervisor.effects import (
    AcknowledgeFact,
    Append,
    ClearUncommitted,
    CommitManifest,
    CommitSnapshot,
    Effect,
    FenceNode,
    Finish,
    InspectCheckpoint,
    RequestNodes,
    RetireCheckpoint,
    Send,
    ShareOffences,
    Show,
    StartAgent,
    WriteMetrics,
)
from opt_train.supervisor.inputs import (
    CheckpointInspected,
    Input,
    JournalWasStalled,
    ManifestCommitted,
)
from opt_train.supervisor.shell.lemon_record import LemonRecord
from opt_train.supervisor.shell.metrics_backlog import MetricsBacklog

STALL_SECONDS = 1.0
RETRY_SECONDS_MAX = 10.0

log = logging.getLogger(__name__)


class Appendable(Protocol):
    """The part of a journal that is used here."""

    head: Head

    def append(self, entry: Entry) -> Entry:
        """Durable on return. Raises OSError, after which nothing has been appended."""


class Links(Protocol):
    """The part of the server that is used here."""

    def send(self, node: str, command: Message) -> bool:
        """Send to the node's agent, if it is connected."""


class EffectRunner:
    """`queue` queues effects, `run` carries them out until `Finish`."""

    def __init__(
        self,
        journal: Appendable,
        metrics: MetricsWriter,
        links: Links,
        cluster: Cluster,
        checkpoints: CheckpointKeeper,
        lemons: LemonRecord,
        feed: Callable[[Input], None],
        show: Callable[[Show], None],
        add_line: Callable[[str], None],
        durable: Callable[[Entry], None],
    ) -> None:
        """`feed` takes answers for the core, `add_line` sentences for a person, `durable` each
        entry once journalled."""
        self._journal, self._links = journal, links
        self._metrics = MetricsBacklog(metrics, lambda: str(journal.head))
        self._cluster, self._checkpoints, self._lemons = cluster, checkpoints, lemons
        self._feed, self._show, self._add_line, self._durable = feed, show, add_line, durable
        self._queue: asyncio.Queue[Effect | Callable[[], object]] = asyncio.Queue()
        self._sent_in_vain: dict[str, int] = {}
        """Node -> how many of the queue's next effects for its agent were meant for a connection
        that is no more."""
        self._to_send: Counter[str] = Counter()
        """Node -> effects for its agent in the queue."""
        # One thread, so that lines stand in the order in which they were decided.
        self._appending = ThreadPoolExecutor(1, thread_name_prefix="append")
        self._working = ThreadPoolExecutor(4, thread_name_prefix="work")
        self._checking = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        # Apart from those that check and commit: to remove thousands of shards may take a file
        # system minutes.
        self._removing = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self._node_locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def queue(self, effects: list[Effect]) -> None:
        """Queue effects. What a person sees does not wait behind the journal."""
        for effect in effects:
            if isinstance(effect, Show):
                self._show(effect)
                continue
            if isinstance(effect, Send | AcknowledgeFact):
                self._to_send[effect.node] += 1
            self._queue.put_nowait(effect)

    def forget_sends(self, node: str) -> None:
        """The node's agent has a new connection: what waits for the journal and was to be sent to
        it is lost with the older one.

        To be called before the core learns of the connection. A `Begin` that came by it would
        begin ranks of which the core believes, by what the agent told it, that they do not run.
        """
        self._sent_in_vain[node] = self._to_send[node]

    def then(self, call: Callable[[], object]) -> None:
        """Call `call` when everything taken so far is done, entries durable."""
        self._queue.put_nowait(call)

    async def run(self) -> Finish:
        """Carry out effects until the core finishes.

        Raises:
            LockLost: another process holds the run's lock now; nothing more may be done.
        """
        while True:
            effect = await self._queue.get()
            if isinstance(effect, Finish):
                return effect
            if isinstance(effect, Append):
                # The barrier. A kill that is sent before its line is durable may be forgotten by a
                # crash, and the successor would adopt a generation that is half dead.
                await self._append(effect.entry)
            elif not self._is_in_vain(effect):
                self._perform(effect)

    def _is_in_vain(self, effect: Effect | Callable[[], object]) -> bool:
        if not isinstance(effect, Send | AcknowledgeFact):
            return False
        self._to_send[effect.node] -= 1
        lost = self._sent_in_vain.get(effect.node, 0)
        self._sent_in_vain[effect.node] = max(0, lost - 1)
        return lost > 0

    def _perform(  # noqa: PLR0912 - one case an effect
        self, effect: Effect | Callable[[], object]
    ) -> None:
        """Everything that nobody waits for."""
        match effect:
            case Send(node, command):
                self._send(node, command)
            case AcknowledgeFact(node, number):
                self._links.send(node, Acknowledge(number))
            case WriteMetrics(attempt, line):
                # The appending thread keeps it behind what was journalled before.
                self._appending.submit(self._metrics.write, attempt, dict(line))
            case StartAgent(node):
                self._spawn(self._on_node(node, partial(self._cluster.start_agent, node)))
            case RequestNodes(count, failed):
                self._spawn(self._on_node("cluster", partial(self._cluster.request, count, failed)))
            case FenceNode(node):
                self._spawn(self._on_node(node, partial(self._cluster.fence, node)))
            case InspectCheckpoint(path, sha256):
                self._spawn(self._answer(partial(self._verify, path, sha256)))
            case CommitManifest():
                self._spawn(self._answer(partial(self._commit, effect, self._journal.head.hash)))
            case CommitSnapshot():
                self._spawn(
                    self._answer(partial(self._commit_snapshot, effect, self._journal.head.hash))
                )
            case ShareOffences(run, created, offences):
                write = partial(self._lemons.write, run, created, offences)
                self._spawn(self._on_node("the record of repeat offenders", write))
            case RetireCheckpoint(path):
                self._removing.submit(self._checkpoints.retire, path)
            case ClearUncommitted(attempts, kept):
                self._removing.submit(self._checkpoints.clear, attempts, kept)
            case _ if callable(effect):
                effect()

    async def settle(self, seconds: float) -> None:
        """Give work under way `seconds` to end, and end the threads that have nothing left to
        do."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        last: tuple[tuple[ThreadPoolExecutor, Callable[[], None]], ...] = (
            (self._appending, self._metrics.close),
            (self._removing, _nothing),  # what a finished run has retired, nobody removes later
        )
        for pool, work in last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.get_running_loop().run_in_executor(pool, work)
        for pool in (self._appending, self._working, self._checking, self._removing):
            # Not waited for: a thread that hangs in a dead file system ends at no time of ours.
            pool.shutdown(wait=False, cancel_futures=True)

    async def _append(self, entry: Entry) -> None:
        began, pause, loop = time.monotonic(), 0.25, asyncio.get_running_loop()
        while True:
            try:
                # Durable means fsynced, which takes seconds to minutes on a file system that fails
                # over: never on the event loop, or the leases of all agents would run out with it.
                appended = await loop.run_in_executor(self._appending, self._journal.append, entry)
                break
            except OSError as error:
                log.error(
                    "the journal cannot be written: %s; training goes on, decisions wait", error
                )
                self._add_line(
                    f"the journal cannot be written ({error.strerror}): training goes on, "
                    "decisions wait for it"
                )
                await asyncio.sleep(pause)
                # For ever: ranks need no journal to train on (invariant 10), and a full disk may be
                # emptied.
                pause = min(2 * pause, RETRY_SECONDS_MAX)
        self._durable(appended)
        seconds = time.monotonic() - began
        # A stall that delayed the line about a stall is not reported in turn: on a slow disk that
        # would never end.
        if seconds > STALL_SECONDS and not isinstance(entry.event, JournalStalled):
            log.warning("an append took %.1f s", seconds)
            self._feed(JournalWasStalled(seconds))

    def _send(self, node: str, command: Message) -> None:
        if isinstance(command, Begin) and not command.journal_head:
            # Only here: the line of the attempt stands in front of this effect and has its hash
            # now.
            command = replace(command, journal_head=self._journal.head.hash)
        if not self._links.send(node, command):
            log.info("%s is not connected: %s forgotten", node, command.kind)

    async def _on_node(self, node: str, work: Callable[[], object]) -> None:
        # One thing at a time on a node, in order; other nodes do not wait for a fence that hangs.
        async with self._node_locks.setdefault(node, asyncio.Lock()):
            try:
                await asyncio.get_running_loop().run_in_executor(self._working, work)
            except OSError as error:
                log.error("%s: %s", node, error)

    async def _answer(self, work: Callable[[], Input]) -> None:
        self._feed(await asyncio.get_running_loop().run_in_executor(self._checking, work))

    def _verify(self, path: str, sha256: str) -> CheckpointInspected:
        found = self._checkpoints.verify(path, sha256)
        return CheckpointInspected(path, found.why, found.manifest_sha256)

    def _commit(self, effect: CommitManifest, journal_head: str) -> ManifestCommitted:
        result = self._checkpoints.commit(
            effect.path, effect.folder, effect.attempt, effect.step, effect.files, journal_head
        )
        return _answer_of(effect.path, effect, result)

    def _commit_snapshot(self, effect: CommitSnapshot, journal_head: str) -> ManifestCommitted:
        result = self._checkpoints.commit_snapshot(
            effect.paths, effect.attempt, effect.step, effect.files, effect.state, journal_head
        )
        return _answer_of(effect.paths[0], effect, result)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Raised where `run` takes it: whoever awaits that sees it, while asyncio would only log
            # it.
            self._queue.put_nowait(partial(_raise, error))


def _answer_of(
    path: str, effect: CommitManifest | CommitSnapshot, result: CommitResult
) -> ManifestCommitted:
    return ManifestCommitted(
        path,
        effect.attempt,
        effect.step,
        result.why,
        result.manifest_sha256,
        result.bytes,
        result.files,
        0.0 if result.why else effect.seconds,
        result.healthy,
        result.world_size,
        result.config_sha256,
    )


def _nothing() -> None:
    """The last piece of work of a thread: when it is done, so is all before it."""


def _raise(error: BaseException) -> None:
    raise error
