"""A rank slot of a node: the rank that runs in it, and the warm rank that waits beside it.

Importing torch takes 1 to 10 s and is most of a restart, so each slot keeps one process that has
all that and waits for `Begin` (0.2 s from there to the first step). The node's fork server starts
it, in milliseconds once it has imported itself (`fork_server`), so the next one is started as soon
as this one has become a rank.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_process import RankProcess
from opt_train.agent.rank_starter import RankStarter
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import (
    ExitNotice,
    Metrics,
    Phase,
    Progress,
    RankExited,
    RankFact,
    RolledBack,
    SlotState,
    SnapshotTaken,
    Stacks,
    Warm,
)
from opt_train.protocol.framing import Message, to_line

STACKS_SECONDS = 2.0
"""Time for a rank to write its stacks before it is killed."""
WARM_RANK_ATTEMPTS = 3
"""Warm ranks that may die one after another before a rank that waits for one is reported dead."""
_BACKOFF_SECONDS_MAX = 30.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Rank:
    """The rank that runs in a slot, as far as it has reported."""

    process: RankProcess
    begin: Begin
    """As it was begun, or as what it has become since by a rollback."""
    begun_as: Begin
    """For its log, which goes on where it began, and for whoever ends the generation that it was
    when nobody knew better."""
    phase: str = "start"
    step: int = -1
    since: float = field(default_factory=time.monotonic)
    """Monotonic seconds at the start of the phase or its last `Progress`."""
    exit_notice: ExitNotice | None = None
    ending: bool = False


class RankSlot:
    """One slot of a node."""

    def __init__(
        self,
        slot: int,
        starter: RankStarter,
        run: RunDirectory,
        warm_logs: Path,
        logs: LogCopies,
        *,
        cores: Collection[int] = (),
        add_fact: Callable[[Message], None],
        add_metrics: Callable[[RankFact], None],
        keep_snapshot: Callable[[int, Begin, SnapshotTaken], None],
        changed: Callable[[], None],
    ) -> None:
        """Ranks run on `cores`; none: wherever the agent may. `add_fact` takes facts that must
        arrive, `add_metrics` lines that may be lost; `keep_snapshot` takes what a rank, with its
        pid and the command that began it, has in its memory; `changed` is called when `state`
        has."""
        self.slot = slot
        self._starter = starter
        self._run, self._warm_logs, self._logs = run, warm_logs, logs
        self._cores = cores
        self._add_fact, self._add_metrics = add_fact, add_metrics
        self._keep_snapshot, self._changed = keep_snapshot, changed
        self._warm_rank: RankProcess | None = None
        self._is_warm = False
        self._warm_ranks_started = 0
        self._warm_ranks_lost = 0
        self._retry: asyncio.TimerHandle | None = None
        self._running: _Rank | None = None
        self._pending: Begin | None = None
        self._pending_since = 0.0
        self._killed_up_to = self._begun_up_to = 0
        self._closed = False

    # What the agent asks --------------------------------------------------------------------------

    def open(self) -> None:
        """Start warming the first rank."""
        self._ensure_warm_rank()

    def begin(self, command: Begin) -> None:
        """Make the warm rank the rank of `command`, as soon as there is one. Safe to receive
        twice."""
        pending = self._pending.generation if self._pending is not None else 0
        # A link that stands still for a while delivers all that was sent again and again: by then
        # the rank may have ended, and its generation is not to live again.
        if command.generation <= max(self._killed_up_to, self._begun_up_to, pending):
            log.info("slot %d: generation %d is not begun (again)", self.slot, command.generation)
            return
        self._pending, self._pending_since = command, time.monotonic()
        if self._running is not None:  # no two generations train at once
            self._running.process.kill()
        self._ensure_warm_rank()
        self._begin_pending()

    def forget_pending(self) -> None:
        """Drop a begin that waits for a warm rank: what does not run when a link opens will not,
        unless begun again."""
        self._pending = None

    def relay_order(self, generation: int, order: Message) -> None:
        """Pass an order on to the running rank, if it is of that generation."""
        if self._running is None or self._running.begin.generation != generation:
            log.info("slot %d: no rank of generation %d to order anything", self.slot, generation)
        elif not self._running.process.send(to_line(order)):
            log.warning("slot %d: the rank does not read its control pipe", self.slot)

    async def end(self, generation: int, stacks: bool) -> None:
        """Kill the rank if its generation is at most `generation`; returns when none lives any
        more."""
        self._killed_up_to = max(self._killed_up_to, generation)
        if self._pending is not None and self._pending.generation <= generation:
            self._pending = None
        rank = self._running
        if rank is None or rank.begun_as.generation > generation:
            return
        # A second Kill while the first one waits for stacks must not ask for them again.
        if stacks and not rank.ending:
            rank.ending = True
            await self._collect_stacks(rank)
        rank.process.kill()
        await rank.process.ended.wait()

    async def close(self) -> None:
        """Kill rank and warm rank; returns when both are gone. Nothing is started any more."""
        self._closed = True
        self._pending = None
        if self._retry is not None:
            self._retry.cancel()
        running = self._running.process if self._running else None
        processes = [p for p in (running, self._warm_rank) if p is not None]
        for process in processes:
            process.kill()
        for process in processes:
            await process.ended.wait()

    def state(self) -> SlotState:
        """The slot now."""
        process = self._running.process if self._running else self._warm_rank
        begin, phase, step, since = self._pending, "start", -1, self._pending_since
        if self._running is not None:
            rank = self._running
            begin, phase, step, since = rank.begin, rank.phase, rank.step, rank.since
            stage = "running"
        elif self._warm_rank is not None:
            stage = "warm" if self._is_warm else "warming"
        else:
            stage = "empty"
        return SlotState(
            slot=self.slot,
            stage=stage,
            spare=self._warm_rank is not None and self._is_warm,
            pid=process.pid if process else 0,
            generation=begin.generation if begin else 0,
            attempt=begin.attempt if begin else "",
            rank=begin.rank if begin else -1,
            phase=phase if begin else "",
            step=step if begin else -1,
            phase_seconds=round(time.monotonic() - since, 3) if begin else 0.0,
            process_state=process.process_state if process else "",
        )

    @property
    def is_busy(self) -> bool:
        """Whether a rank runs here, or is about to begin."""
        return self._running is not None or self._pending is not None

    def runs(self, generation: int, rank: int) -> bool:
        """Whether `rank` of `generation` runs here."""
        begun = self._running.begin if self._running else None
        return begun is not None and (begun.generation, begun.rank) == (generation, rank)

    # The warm rank --------------------------------------------------------------------------------

    def _ensure_warm_rank(self) -> None:
        if self._closed or self._warm_rank is not None or self._retry is not None:
            return
        self._warm_ranks_started += 1
        self._is_warm = False
        try:
            self._warm_rank = RankProcess(
                self._starter, self._take_fact, self._take_end, self._cores
            )
        except OSError as error:
            log.error("slot %d: a warm rank cannot be started: %s", self.slot, error)
            self._schedule_retry()
        self._changed()

    def _schedule_retry(self) -> None:
        self._warm_ranks_lost += 1
        # Bounded before it is a power: after a night of lost processes that is no number any more.
        delay = min(0.25 * 2 ** min(self._warm_ranks_lost, 10), _BACKOFF_SECONDS_MAX)
        self._retry = asyncio.get_running_loop().call_later(delay, self._retry_warm_rank)

    def _retry_warm_rank(self) -> None:
        self._retry = None
        self._ensure_warm_rank()

    def _begin_pending(self) -> None:
        if (
            self._pending is None
            or self._running is not None
            or self._warm_rank is None
            or not self._is_warm
        ):
            return
        rank = self._running = _Rank(self._warm_rank, self._pending, self._pending)
        self._begun_up_to = self._pending.generation
        self._warm_rank, self._is_warm, self._pending = None, False, None
        self._logs.begin(rank.process.log, self._log_of(rank.begun_as))
        if not rank.process.send(to_line(rank.begin)):
            log.warning("slot %d: the warm rank did not take its begin", self.slot)
            rank.process.kill()
        self._ensure_warm_rank()
        self._changed()

    # What processes do ----------------------------------------------------------------------------

    def _take_fact(self, process: RankProcess, fact: Message) -> None:
        if process is self._warm_rank:
            if isinstance(fact, Warm) and not self._is_warm:
                self._is_warm = True
                self._warm_ranks_lost = 0
                self._begin_pending()
                self._changed()
            return
        rank = self._running
        if rank is None or process is not rank.process:
            return
        match fact:
            case Phase(phase=phase, step=step):
                rank.phase, rank.step, rank.since = phase, step, time.monotonic()
            case Progress():
                rank.since = time.monotonic()
            case Metrics():
                self._add_metrics(_as_rank_fact(rank, fact))
            case SnapshotTaken():
                self._keep_snapshot(process.pid, rank.begin, fact)
            case RolledBack(_, attempt, generation):
                rank.begin = replace(rank.begin, attempt=attempt, generation=generation)
                # A `Begin` for it would be for ranks that are there already.
                self._begun_up_to = max(self._begun_up_to, generation)
                self._changed()
            case Warm():
                pass
            case _:
                if isinstance(fact, ExitNotice):
                    rank.exit_notice = fact
                self._add_fact(_as_rank_fact(rank, fact))

    def _take_end(self, process: RankProcess) -> None:
        if process is self._warm_rank:
            self._warm_rank, self._is_warm = None, False
            path = self._warm_logs / f"slot{self.slot}-{self._warm_ranks_started - 1:04d}.log"
            if process.log.size:
                self._logs.begin(process.log, path)
            if not self._closed:
                log.warning(
                    "slot %d: the warm rank died (%s); see %s", self.slot, process.returncode, path
                )
                self._schedule_retry()
            if self._pending is not None and self._warm_ranks_lost >= WARM_RANK_ATTEMPTS:
                self._report_exit(_Rank(process, self._pending, self._pending), path)
                self._pending = None
        elif self._running is not None and process is self._running.process:
            rank, self._running = self._running, None
            self._report_exit(rank, self._log_of(rank.begun_as))
            self._begin_pending()
            self._ensure_warm_rank()
        self._logs.end(process.log)
        self._changed()

    def _report_exit(self, rank: _Rank, log_path: Path) -> None:
        process = rank.process
        code = process.returncode if process.returncode is not None else 0
        self._add_fact(
            RankExited(
                generation=rank.begin.generation,
                rank=rank.begin.rank,
                slot=self.slot,
                pid=process.pid,
                code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
                killed_by_agent=process.killed_by_agent,
                leaving=rank.exit_notice,
                phase=rank.phase,
                step=rank.step,
                log_tail=process.log.tail(self._name(log_path)),
            )
        )

    async def _collect_stacks(self, rank: _Rank) -> None:
        # A stopped process (T) runs no handler: waiting for it would cost the restart two seconds.
        written = rank.process.log
        state, before = rank.process.process_state, written.size
        rank.process.ask_stacks()
        size, deadline = before, time.monotonic() + STACKS_SECONDS
        while state != "T" and not rank.process.ended.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            grown = written.size
            if size > before and grown == size:
                break  # it wrote, and has finished
            size = grown
        lines = written.tail(self._name(self._log_of(rank.begun_as)), after_byte=before)
        self._add_fact(Stacks(rank.begin.generation, rank.begin.rank, bool(lines), state, lines))

    def _log_of(self, begin: Begin) -> Path:
        return self._run.rank_log(begin.attempt, begin.node, begin.rank)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()


def _as_rank_fact(rank: _Rank, fact: Message) -> RankFact:
    return RankFact(rank.begin.generation, rank.begin.attempt, rank.begin.rank, fact)


def rank_environment(mark: Mapping[str, str], threads: int, interface: str) -> dict[str, str]:
    """The environment of a node's ranks: this process's, with `mark`, threads of a rank and the
    network interface."""
    environment = {**os.environ, **mark, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    # OMP_NUM_THREADS before the import: OpenMP reads it once. numpy's library would start as many
    # at its import, and ranks are forked after that.
    environment["OPENBLAS_NUM_THREADS"] = "1"
    if interface:
        environment["GLOO_SOCKET_IFNAME"] = interface
        environment["NCCL_SOCKET_IFNAME"] = interface
    return environment
