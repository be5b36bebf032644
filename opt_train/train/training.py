"""Everything one rank trains with, and what it does between steps: hear, obey, validate, save."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from opt_train.checkpoint.background import BackgroundSave, Staging
from opt_train.checkpoint.manifest import CheckpointError
from opt_train.checkpoint.save import save as save_checkpoint
from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshot, Snapshots
from opt_train.checkpoint.tensors import reshard
from opt_train.config.run_config import RunConfig
from opt_train.data.batches import Batches, ValidationSet
from opt_train.optim.clip import predivision
from opt_train.optim.in_force import in_force
from opt_train.optim.loss_scale import LossScale
from opt_train.parallel.engine import Engine
from opt_train.parallel.layout import Layout
from opt_train.parallel.measure import loss_over
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import RANK_UNSTABLE, STOPPED
from opt_train.protocol.facts import (
    ExitNotice,
    Metrics,
    OrderObeyed,
    Phase,
    Progress,
    SavedFile,
    SaveFailed,
    ShardsSaved,
    SnapshotTaken,
    Validation,
)
from opt_train.protocol.orders import Order, SaveAndStop
from opt_train.run.ledger import with_order
from opt_train.train.fact_pipe import Publish, log_line
from opt_train.train.metrics import Clock, MetricsSource, metrics_line
from opt_train.train.orders import OrderSource, StopSignals
from opt_train.train.state import RNG_RULE, TrainState
from opt_train.train.stats_reducer import StatsReducer
from opt_train.train.step_stats import StepStats

PROGRESS_SECONDS = 0.5


@dataclass(slots=True, kw_only=True)
class Training:
    """One rank's share of a run. Its methods that talk to other ranks are called by all of them, in
    the same order."""

    begin: Begin
    config: RunConfig
    layout: Layout
    device: torch.device
    engine: Engine
    loss_scale: LossScale
    batches: Batches
    validation_sets: Mapping[str, ValidationSet]
    """By name: ``validation``, the part of the corpus that is held out, and the named sets."""
    data_fingerprint: str
    reducer: StatsReducer
    staging: Staging
    saving_group: dist.ProcessGroup
    """gloo, for a save that goes on beside training."""
    snapshots: Snapshots | None = None
    """None: there are to be none, or there is no agent that would hold them."""
    orders: OrderSource
    signals: StopSignals
    publish: Publish
    state: TrainState
    clock: Clock = field(default_factory=Clock)
    newest: StepStats | None = None
    """The last word heard."""
    stop_votes: int = 0
    order_seen: int = 0
    """The newest order number that a word has carried."""
    order_obeyed: int = 0
    inbox: list[Order] = field(default_factory=list)
    """Rank 0: orders not obeyed yet."""
    saved_step: int = -1
    saving: BackgroundSave | None = None
    """The save that goes on beside training."""
    snapshot: Snapshot | None = None
    """The snapshot that goes on beside training, or has ended and has not been told."""
    snapshot_step: int = -1
    """Of the last one begun."""
    is_written: bool = False
    """A word has said that no rank writes any more at `saving`."""
    started_step: int = field(init=False)
    """Where this rank began: `state.step` before its first one."""
    has_published_metrics: bool = False
    progress_published: float = 0.0

    def __post_init__(self) -> None:
        self.order_seen = self.order_obeyed = self.begin.order_number
        self.started_step = self.state.step

    @property
    def leads(self) -> bool:
        return self.begin.rank == 0

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(self.begin.rank)

    @property
    def predivision(self) -> float:
        """What gradients are multiplied by beside the loss scale, against overflow in their sum
        over ranks."""
        precision = self.config.precision
        return predivision(
            precision.predivide and precision.compute == "fp16", self.layout.data_world
        )

    def enter(self, phase: str) -> None:
        """Say what the rank is busy with from now on."""
        self.publish(Phase(phase, self.state.step))

    # Between steps --------------------------------------------------------------------------------

    def poll_orders(self) -> int:
        """Take in what came on the control pipe; returns the newest order's number, for the word.

        Raises:
            AgentGone: the agent died.
        """
        self.inbox += [order for order in self.orders.poll() if order.number > self.order_obeyed]
        return max([self.order_obeyed, *(order.number for order in self.inbox)])

    def receive_stats(self, before: int) -> None:
        """Take in the stats of the steps below `before`: counters, metrics, votes, the newest
        order's number."""
        self.enter("waiting")
        for stats in self.reducer.collect(before):
            self.newest = stats
            self.state.absorb(stats, self.loss_scale.policy.floor)
            self.stop_votes += stats.stop_votes
            self.order_seen = max(self.order_seen, stats.order_number)
            self.is_written = not stats.saving_ranks
            if self.leads:
                self._publish_metrics(stats)

    def _publish_metrics(self, stats: StepStats) -> None:
        source = MetricsSource(
            config=self.config,
            begin=self.begin,
            state=self.state,
            stats=stats,
            learning_rate=in_force(self.config, self.state.ledger, stats.step)["lr"],
            device=self.device,
        )
        self.publish(Metrics(metrics_line(source, is_first=not self.has_published_metrics)))
        self.has_published_metrics = True

    def obey(self) -> ExitNotice | None:
        """Do what the words that were heard ask for; a `ExitNotice` ends training. The same on
        every rank."""
        if self.snapshot is not None and self.snapshot.wait(0.0):
            self.end_snapshot()
        if self.is_written:
            self.end_save()
        if self.state.floor_steps >= self.config.train.max_nonfinite_steps:
            self.end_snapshot()
            self.end_save()
            return self._unstable()
        for order in self._new_orders():
            # Told before the work: the order holds from here on, and a long save must not look like
            # a deaf rank.
            if self.leads:
                self.publish(OrderObeyed(order.number, self.state.step))
            if isinstance(order, SaveAndStop):
                return self._save_and_stop(f"order {order.number}: {order.reason}")
            self.state.ledger = with_order(self.state.ledger, order, self.state.step)
        if self.stop_votes:
            what = self.signals.received or "a signal to another rank"
            return self._save_and_stop(f"asked to stop by {what}")
        return None

    def _unstable(self) -> ExitNotice:
        reason = f"{self.state.floor_steps} steps in a row had a gradient that is not finite"
        if self.config.precision.compute != "fp16":
            return ExitNotice(RANK_UNSTABLE, self.state.step, reason, cause="loss_nan")
        reason += f" with the loss scale at its floor of {self.loss_scale.policy.floor:g}"
        return ExitNotice(RANK_UNSTABLE, self.state.step, reason, cause="loss_scale_floor")

    def _new_orders(self) -> list[Order]:
        if self.order_seen <= self.order_obeyed:
            return []
        due = [order for order in self.inbox if self.order_obeyed < order.number <= self.order_seen]
        self.inbox = [order for order in self.inbox if order.number > self.order_seen]
        self.order_obeyed = self.order_seen
        return self.reducer.share_orders(sorted(due, key=lambda order: order.number))

    # Long work ------------------------------------------------------------------------------------

    def validate(self, names: Sequence[str]) -> None:
        """Measure the loss over the whole of each of these validation sets."""
        if not names:
            return
        self.receive_stats(before=self.state.step)
        self.enter("evaluation")
        self.engine.model.eval()
        for name in names:
            total, tokens = self._loss_over(self.validation_sets[name])
            if self.leads:
                self.publish(Validation(name, self.state.step, total / tokens, round(tokens)))
        self.engine.model.train()
        reshard(self.engine.model)
        self.clock.reset()

    def _loss_over(self, validation: ValidationSet) -> tuple[float, float]:
        """Sum of the losses, in nats, and tokens, over the world."""
        world = self.layout.data_world
        share = validation.share(
            data_rank=self.data_rank, data_world=world, micro_batch=self.config.train.micro_batch
        )
        loss_sum, tokens = loss_over(
            self.engine.model,
            share,
            self.device,
            lambda done: self._progress(done * world, validation.sequences),
        )
        share_of_rank = (
            1 / self.layout.tensor
        )  # the ranks of a tensor group have read the same sequences
        total, count = self.reducer.sum(loss_sum * share_of_rank, tokens * share_of_rank)
        return total, count

    def begin_save(self) -> None:
        """Begin to save; with `checkpoint.asynchronous` training goes on meanwhile, and `end_save`
        says how it went."""
        if not self.config.checkpoint.asynchronous:
            self.save()
            return
        self.end_save()
        if self.saved_step == self.state.step:
            return
        self.receive_stats(before=self.state.step)
        self.saving = BackgroundSave(
            self.state.step,
            self.staging,
            self.engine.tensors(),
            self._state_json(),
            self._folder(),
            self.saving_group,
        )
        self.is_written = False
        self.clock.reset()

    @property
    def is_writing(self) -> bool:
        """This rank's part of a checkpoint is on its way to the disk."""
        return self.saving is not None and not self.saving.wait(0.0)

    def wait_copied(self) -> None:
        """The weights are about to change: whoever copies them must have done."""
        if self.saving is not None:
            self.saving.wait_copied()
        if self.snapshot is not None:
            self.snapshot.wait_copied()

    def begin_snapshot(self) -> None:
        """Begin to put this rank's state into memory that its agent will hold; a boundary soon says
        that it is there.

        A state that is not well is left out: those that are held are then the last that were.
        """
        if self.snapshots is None or self.snapshot_step == self.state.step:
            return
        self.end_snapshot()
        self.receive_stats(before=self.state.step)
        if not self.state.healthy:
            return
        state = (
            {**self._state_json(), PARTS: OWN, "world_size": self.begin.world_size}
            if self.leads
            else None
        )
        self.snapshot = self.snapshots.begin(self.state.step, self.engine.tensors(), state)
        self.snapshot_step = self.state.step

    def end_snapshot(self) -> None:
        """Wait for the snapshot that goes on beside training, if one does, and tell that it is
        there."""
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is None:
            return
        if not snapshot.wait(0.0):
            self.enter("checkpoint")
        try:
            files = snapshot.files()
        except CheckpointError as error:
            log_line(f"{error}; training goes on")
            return
        self.publish(SnapshotTaken(snapshot.step, files, snapshot.seconds))

    def end_save(self) -> None:
        """Wait for the save that goes on beside training, if one does, and tell how it went."""
        saving, self.saving = self.saving, None
        if saving is None:
            return
        if not saving.wait(0.0):
            self.enter("checkpoint")
        told = (0, 0)
        while not saving.wait(PROGRESS_SECONDS):
            if saving.written != told:  # what stands still is not progress
                told = saving.written
                self.publish(Progress(*told))
        self._report_saved(saving.step, saving.folder, saving.files, lambda: saving.seconds)

    def save(self) -> bool:
        """Write this rank's part of a checkpoint, and return when that is done; True where all
        ranks did it."""
        self.end_save()
        if self.saved_step == self.state.step:
            return True
        self.receive_stats(before=self.state.step)
        self.enter("checkpoint")
        began, folder = time.monotonic(), self._folder()

        def write() -> tuple[SavedFile, ...]:
            return save_checkpoint(
                self.engine.tensors(),
                self._state_json(),
                folder,
                process_group=self.reducer.group,
                progress=self._progress,
            )

        self._report_saved(self.state.step, folder, write, lambda: time.monotonic() - began)
        self.clock.reset()
        return self.saved_step == self.state.step

    def _report_saved(
        self,
        step: int,
        folder: Path,
        files: Callable[[], tuple[SavedFile, ...]],
        seconds: Callable[[], float],
    ) -> None:
        """A failure is told, and training goes on: a run that trains is worth more than one
        checkpoint."""
        try:
            written = files()
        except CheckpointError as error:
            # The save has failed on every rank alike.
            self.publish(SaveFailed(step, str(error)))
            return
        self.saved_step = step
        self.publish(ShardsSaved(step, str(folder), written, seconds()))

    def _folder(self) -> Path:
        return checkpoint_folder(
            Path(self.begin.run_directory), self.begin.attempt, self.state.step
        )

    def _save_and_stop(self, why: str) -> ExitNotice:
        self.begin_snapshot()  # the fastest first: whoever asks may not wait for a save
        self.end_snapshot()
        if self.save():
            return ExitNotice(
                STOPPED,
                self.state.step,
                f"{why}; state saved at step {self.state.step}",
                cause="stopped",
            )
        reason = (
            f"{why}; the save at step {self.state.step} failed, so the last committed "
            "checkpoint counts"
        )
        return ExitNotice(STOPPED, self.state.step, reason, cause="stopped")

    def _state_json(self) -> dict[str, object]:
        return {
            **self.state.to_json(),
            "data_fingerprint": self.data_fingerprint,
            "loss_scale": self.loss_scale.to_json(),
            "rng": {"rule": RNG_RULE, "seed": self.config.seed},
            "layout": dataclasses.asdict(self.layout),
            "attempt": self.begin.attempt,
            "generation": self.begin.generation,
            "configuration_sha256": self.begin.config_sha256,
            "journal_head": self.begin.journal_head,
        }

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.progress_published >= PROGRESS_SECONDS:
            self.progress_published = now
            self.publish(Progress(min(done, total), total))


def checkpoint_folder(run_directory: Path, attempt: str, step: int) -> Path:
    """Where the checkpoint of `step` lies: under its attempt, so that a stale generation can only
    write to its own."""
    return run_directory / "checkpoints" / attempt / f"step-{step:08d}"
