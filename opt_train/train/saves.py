"""One rank's saves of checkpoints: beside training where that is asked for, and reported once.

A save beside training has three moments. `begin` copies the tensors (the next update waits for the
copy, `wait_copied`) and hands them to a thread. The step stats count the ranks whose thread still
writes; when they say none, every rank calls `end_if_written` at the same boundary and reports its
files, which the supervisor needs of all ranks to commit the manifest.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from opt_train.checkpoint.background import BackgroundSave, Staging
from opt_train.checkpoint.held_folder import HeldFolder
from opt_train.checkpoint.manifest import CheckpointError
from opt_train.checkpoint.save import save as save_checkpoint
from opt_train.protocol.facts import Progress, SavedFile, SaveFailed, ShardsSaved
from opt_train.train.context import PROGRESS_SECONDS, RankContext
from opt_train.train.state import TrainState
from opt_train.train.stats.receiver import StatsReceiver


class Checkpoints:
    """Saves this rank's part of checkpoints. Every rank calls the same methods in the same
    order."""

    def __init__(
        self,
        context: RankContext,
        stats: StatsReceiver,
        group: dist.ProcessGroup | None,
        background_group: dist.ProcessGroup,
        saved_step: int = -1,
    ) -> None:
        """Save nothing yet.

        Args:
            group: gloo, for saves that training waits for.
            background_group: gloo, for one that goes on beside training: the step stats' group is
                in use meanwhile, and two threads on one group would mix up their collectives.
            saved_step: of a checkpoint that is there already; -1: of none.
        """
        self._context = context
        self._stats = stats
        self._group = group
        self._background_group = background_group
        self._run_folder = HeldFolder(Path(context.begin.run_directory))
        self._staging = Staging(context.device)
        self._under_way: BackgroundSave | None = None
        self.saved_step = saved_step
        """Of the last save that every rank has done."""

    def begin_attempt(self) -> None:
        """What is saved from here on is of another attempt, which has no checkpoint yet."""
        self.saved_step = -1

    def save_if_due(self, state: TrainState) -> None:
        """Begin a save where `checkpoint.every_steps` says so."""
        if state.is_due(self._context.config.checkpoint.every_steps):
            self.begin()

    def save_restored(self, state: TrainState) -> None:
        """Begin to save a state that was restored from memory: a save that was under way when the
        run broke is lost, and the memory is no checkpoint."""
        if state.step and self._context.config.checkpoint.every_steps:
            self.begin()

    def begin(self) -> None:
        """Begin to save. With `checkpoint.asynchronous` training goes on meanwhile."""
        context = self._context
        if not context.config.checkpoint.asynchronous:
            self.save()
            return
        self.end()
        # An order may ask for the step that was saved as due.
        if self.saved_step == context.state.step:
            return
        # The state that is saved counts every step that its weights have taken.
        self._stats.receive(before=context.state.step)
        self._under_way = BackgroundSave(
            context.state.step,
            self._staging,
            context.engine.tensors(),
            context.state_json(),
            self._folder(),
            self._background_group,
            self._run_folder,
        )
        context.clock.reset()

    @property
    def is_writing(self) -> bool:
        """This rank's part of a checkpoint is on its way to the disk."""
        return self._under_way is not None and not self._under_way.wait(0.0)

    def wait_copied(self) -> None:
        """Wait until the weights may change: whoever copies them has done."""
        if self._under_way is not None:
            self._under_way.wait_copied()

    def end_if_written(self) -> None:
        """Report the save beside training, where the stats say that no rank writes at it any
        more."""
        newest = self._stats.newest
        if self._under_way is None or newest is None:
            return
        # Stats of earlier steps speak of the save before.
        if newest.step >= self._under_way.step and not newest.saving_ranks:
            self.end()

    def end(self) -> None:
        """Wait for the save beside training, if there is one, and report how it went."""
        saving, self._under_way = self._under_way, None
        if saving is None:
            return
        if not saving.wait(0.0):
            self._context.enter("checkpoint")
        written = (0, 0)
        while not saving.wait(PROGRESS_SECONDS):
            if saving.written != written:  # what stands still is not progress
                written = saving.written
                self._context.publish(Progress(*written))
        self._report(saving.step, saving.folder, saving.files, lambda: saving.seconds)

    def save(self) -> bool:
        """Write this rank's part of a checkpoint and wait for it; True where all ranks did it."""
        context = self._context
        self.end()
        if self.saved_step == context.state.step:
            return True
        self._stats.receive(before=context.state.step)
        context.enter("checkpoint")
        began, folder = time.monotonic(), self._folder()

        def write() -> tuple[SavedFile, ...]:
            return save_checkpoint(
                context.engine.tensors(),
                context.state_json(),
                folder,
                run_folder=self._run_folder,
                process_group=self._group,
                progress=context.progress,
            )

        self._report(context.state.step, folder, write, lambda: time.monotonic() - began)
        context.clock.reset()
        return self.saved_step == context.state.step

    def _report(
        self,
        step: int,
        folder: Path,
        files: Callable[[], tuple[SavedFile, ...]],
        seconds: Callable[[], float],
    ) -> None:
        """Publish the files, or the failure, with which training goes on: a run that trains is
        worth more than one checkpoint."""
        try:
            written = files()
        except CheckpointError as error:
            # The save has failed on every rank alike.
            self._context.publish(SaveFailed(step, str(error)))
            return
        self.saved_step = step
        self._context.publish(ShardsSaved(step, str(folder), written, seconds()))

    def _folder(self) -> Path:
        context = self._context
        run_directory = Path(context.begin.run_directory)
        return checkpoint_folder(run_directory, context.begin.attempt, context.state.step)


def checkpoint_folder(run_directory: Path, attempt: str, step: int) -> Path:
    """Where the checkpoint of `step` lies: under its attempt, so that a stale generation can only
    write to its own."""
    return run_directory / "checkpoints" / attempt / f"step-{step:08d}"
