"""One rank's snapshots: copies of its state in memory that its agent takes over, every few steps.

They make a restart cheap where the machine lives on: nothing is read from a disk, and little
training is done again.
"""

from collections.abc import Mapping
from typing import Any

from opt_train.checkpoint.manifest import CheckpointError
from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshot, Snapshots
from opt_train.protocol.facts import SnapshotTaken
from opt_train.train.context import RankContext
from opt_train.train.fact_pipe import log_line
from opt_train.train.state import TrainState
from opt_train.train.stats.receiver import StatsReceiver


class MemorySnapshots:
    """Takes snapshots beside training. Every rank calls the same methods in the same order."""

    def __init__(
        self, context: RankContext, stats: StatsReceiver, memory: Snapshots | None
    ) -> None:
        """Take none yet.

        Args:
            memory: where they go; None: there are to be none, or there is no agent to hold them.
        """
        self._context = context
        self._stats = stats
        self._memory = memory
        self._begun_step = -1
        self._states: dict[int, Mapping[str, Any]] = {}
        """By step, of the snapshots that are here: what is no tensor."""
        self.under_way: Snapshot | None = None
        """Being taken, or taken and not published yet."""
        self.stopping = False
        """The ranks stop at the boundary that they are at."""

    def take_if_due(self, state: TrainState) -> None:
        """Begin a snapshot where `checkpoint.memory_every_steps` says so."""
        if state.is_due(self._context.config.checkpoint.memory_every_steps):
            self.begin()

    def take_first(self, state: TrainState) -> None:
        """Begin a snapshot of the state that the run begins with, where any are taken: whoever
        finds the learning rate too high goes back to it."""
        if state.step == 0 and self._context.config.checkpoint.memory_every_steps:
            self.begin()

    def begin(self) -> None:
        """Begin to copy this rank's state into memory; a boundary soon publishes that it is there.

        A state that is not well is left out: the snapshots that are there are then the last that
        were.
        """
        context = self._context
        if self._memory is None or self._begun_step == context.state.step:
            return
        self.end()
        self._stats.receive(before=context.state.step)
        # Decided from the step stats, so all ranks leave out the same ones.
        if not context.state.healthy:
            return
        state = {**context.state_json(), PARTS: OWN, "world_size": context.begin.world_size}
        kept = {step: known for step, known in self._states.items() if self._memory.has(step)}
        self._states = {**kept, context.state.step: state}
        # A copy in this process's memory; the agent takes the file descriptors over, so the copy
        # outlives the rank.
        self.under_way = self._memory.begin(
            context.state.step, context.engine.tensors(), state if context.is_rank_zero else None
        )
        self._begun_step = context.state.step

    def wait_copied(self) -> None:
        """Wait until the weights may change: whoever copies them has done."""
        if self.under_way is not None:
            self.under_way.wait_copied()

    def has(self, step: int) -> bool:
        """Whether this rank can go back to `step`; none may be under way."""
        return self._memory is not None and self._memory.has(step)

    def put_back(self, step: int) -> Mapping[str, Any]:
        """Give the engine its state of `step` back, which is here, and forget all that came after
        it; returns what of the state is no tensor."""
        assert self._memory is not None
        self._memory.put_back(step, self._context.engine)
        # The same step comes again, on another branch.
        self._begun_step = step
        return self._states[step]

    def end_if_taken(self) -> None:
        """Publish the snapshot where it is there; does not wait. Ranks may do so at different
        boundaries: each agent holds its own ranks' files."""
        if self.under_way is not None and self.under_way.wait(0.0):
            self.end()

    def end(self) -> None:
        """Wait for the snapshot, if there is one, and publish that it is there."""
        snapshot, self.under_way = self.under_way, None
        if snapshot is None:
            return
        if not snapshot.wait(0.0):
            self._context.enter("checkpoint")
        try:
            files = snapshot.files()
        except CheckpointError as error:
            log_line(f"{error}; training goes on")
            return
        is_last = self.stopping and snapshot.step == self._context.state.step
        self._context.publish(SnapshotTaken(snapshot.step, files, snapshot.seconds, is_last))
