"""One rank's share of a run: its parts, and what it obeys between steps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from opt_train.checkpoint.snapshot import Snapshots
from opt_train.config.run_config import RunConfig
from opt_train.data.batch_checks import Repeats
from opt_train.data.batches import Batches, ValidationSet
from opt_train.optim.adamw import put_in_force
from opt_train.optim.update_ratio import UpdateRatio
from opt_train.parallel.engine import Engine, MeasuresLayers
from opt_train.protocol.exits import RANK_UNSTABLE, STOPPED
from opt_train.protocol.facts import ODD_RANKS_MAX, ExitNotice, OrderObeyed, Probed, RolledBack
from opt_train.protocol.orders import PROBE_BATCHES, Order, RollBack, SaveAndStop
from opt_train.run.ledger import with_order
from opt_train.train.context import RankContext
from opt_train.train.orders import OrderSource, StopSignals
from opt_train.train.rendezvous import control_group
from opt_train.train.replays import Replays
from opt_train.train.resume import put_ledger_in_force, report_in_force
from opt_train.train.saves import Checkpoints
from opt_train.train.snapshots import MemorySnapshots
from opt_train.train.state import TrainState, values_of
from opt_train.train.stats.receiver import StatsReceiver
from opt_train.train.stats.reducer import StatsReducer
from opt_train.train.validation import Validator


@dataclass(slots=True, kw_only=True)
class Training:
    """The parts of one rank. Methods that talk to other ranks are called by all of them, in the
    same order."""

    context: RankContext
    batches: Batches
    reducer: StatsReducer
    stats: StatsReceiver
    validator: Validator
    update_ratio: UpdateRatio
    snapshots: MemorySnapshots
    checkpoints: Checkpoints
    orders: OrderSource
    signals: StopSignals
    repeats: Repeats = field(default_factory=Repeats)
    replays: Replays = field(default_factory=Replays)
    inbox: list[Order] = field(default_factory=list)
    """Rank 0: orders not obeyed yet."""
    order_obeyed: int = field(init=False)
    """The newest one's number."""
    started_step: int = field(init=False)
    """Where this rank began: `state.step` before its first one."""

    def __post_init__(self) -> None:
        self.order_obeyed = self.context.begin.order_number
        self.started_step = self.state.step

    @property
    def config(self) -> RunConfig:
        return self.context.config

    @property
    def engine(self) -> Engine:
        return self.context.engine

    @property
    def state(self) -> TrainState:
        return self.context.state

    def wait_copied(self) -> None:
        """Wait until the weights may change: whoever copies them has done."""
        self.checkpoints.wait_copied()
        self.snapshots.wait_copied()

    def poll_orders(self) -> int:
        """Take in what came on the control pipe; returns the newest order's number, for the step
        stats.

        Raises:
            AgentGone: the agent died.
        """
        self.inbox += [order for order in self.orders.poll() if order.number > self.order_obeyed]
        return max([self.order_obeyed, *(order.number for order in self.inbox)])

    def obey(self) -> ExitNotice | None:
        """Do what the stats received so far ask for; an `ExitNotice` ends training. The same on
        every rank."""
        # Before the snapshot of this very boundary may be published: it is the last one then.
        self.snapshots.stopping = bool(self.stats.stop_votes)
        self.snapshots.end_if_taken()
        self.checkpoints.end_if_written()
        if self.state.floor_steps >= self.config.train.max_nonfinite_steps:
            self.snapshots.end()
            self.checkpoints.end()
            return self._unstable()
        for order in self._new_orders():
            if isinstance(order, RollBack):
                if (notice := self._roll_back(order)) is not None:
                    return notice
                continue
            # Published before the work: the order holds from here on, and a long save must not look
            # like a rank that does not obey.
            if self.context.is_rank_zero:
                self.context.publish(OrderObeyed(order.number, self.state.step))
            if isinstance(order, SaveAndStop):
                return self._save_and_stop(f"order {order.number}: {order.reason}")
            self.state.ledger = with_order(self.state.ledger, order, self.state.step)
        if self.stats.stop_votes:
            what = self.signals.received or "a signal to another rank"
            return self._save_and_stop(f"asked to stop by {what}")
        return None

    def _new_orders(self) -> list[Order]:
        newest = self.stats.order_number
        # The same on every rank, so either all of them share the orders or none does.
        if newest <= self.order_obeyed:
            return []
        due = [order for order in self.inbox if self.order_obeyed < order.number <= newest]
        self.inbox = [order for order in self.inbox if order.number > newest]
        shared = self.reducer.share_orders(sorted(due, key=lambda order: order.number))
        self.order_obeyed = max([newest, *(order.last_number for order in shared)])
        return shared

    def _roll_back(self, order: RollBack) -> ExitNotice | None:
        """Go back in place to a snapshot that every rank has. The same as a restart from it, to the
        bit."""
        context = self.context
        began = time.monotonic()
        # Whoever copies or counts a state does so of the one that is given up.
        self.snapshots.end()
        self.checkpoints.end()
        self.stats.receive(before=self.state.step)
        (having,) = self.reducer.sum(float(self.snapshots.has(order.step)))
        if having < context.begin.world_size:
            # Not obeyed: whoever ordered it has ranks begin again from a checkpoint.
            reason = (
                f"order {order.number} is to go back to step {order.step}, whose snapshot only "
                f"{having:.0f} of {context.begin.world_size} ranks have"
            )
            return ExitNotice(RANK_UNSTABLE, self.state.step, reason, cause="unknown")
        # All have it, and nothing can fail from here on that would not end the rank.
        context.enter("start")
        if context.is_rank_zero:
            context.publish(OrderObeyed(order.number, self.state.step))
        # The last that is said as the old one: of the journal's head nothing is known here.
        context.publish(RolledBack(order.step, order.attempt, order.generation))
        context.begin = replace(
            context.begin,
            attempt=order.attempt,
            generation=order.generation,
            journal_head="",
        )
        ledger = with_order(self.state.ledger, order, order.step)
        saved = self.snapshots.put_back(order.step)
        context.state = TrainState.from_json(saved)
        put_ledger_in_force(self.config, context.state, ledger)
        context.loss_scale.restore(saved["loss_scale"])
        context.guard.restore(
            context.state.accepted_norms,
            context.state.accepted_losses,
            context.state.refused_in_row,
        )
        self.started_step = order.step
        parts = (self.update_ratio, self.stats, self.checkpoints, self.validator, self.replays)
        for part in parts:
            part.begin_attempt()
        # The optimizer still has what the last step was taken with.
        values = values_of(self.config, context.state)
        put_in_force(self.engine.optimizer, values)
        context.loss_scale.put_in_force(values)
        report_in_force(
            self.config,
            self.engine.optimizer,
            context.loss_scale,
            context.state,
            saved["loss_scale"],
            context.data_fingerprint,
            {"load": round(time.monotonic() - began, 3)},
            context.publish,
        )
        self.probe(order.number, order.probe)
        context.clock.reset()
        return None

    def probe(self, order: int, places: tuple[int, ...]) -> None:
        """Say what the data at `places` looks like to this state, as rollback `order` wants it;
        nowhere, and it is nothing. Nobody waits for what is made of it: training goes on."""
        if not places:
            return
        losses = tuple(self.validator.losses_at(places, self.batches, PROBE_BATCHES))
        odd = self.validator.odd_ranks(places[0], self.batches)[:ODD_RANKS_MAX]
        if self.context.is_rank_zero:
            self.context.publish(Probed(order, self.state.step, places, losses, odd))

    def _unstable(self) -> ExitNotice:
        step = self.state.step
        reason = f"{self.state.floor_steps} steps in a row had a gradient that is not finite"
        if self.config.precision.compute != "fp16":
            return ExitNotice(RANK_UNSTABLE, step, reason, cause="loss_nan")
        floor = self.context.loss_scale.floor
        reason += f" with the loss scale at its floor of {floor:g}"
        return ExitNotice(RANK_UNSTABLE, step, reason, cause="loss_scale_floor")

    def _save_and_stop(self, why: str) -> ExitNotice:
        # The fastest first: whoever asks may not wait for a save.
        self.snapshots.begin()
        self.snapshots.end()
        step = self.state.step
        if self.checkpoints.save():
            reason = f"{why}; state saved at step {step}"
        else:
            reason = (
                f"{why}; the save at step {step} failed, so the last committed checkpoint counts"
            )
        return ExitNotice(STOPPED, step, reason, cause="stopped")


def assemble(
    context: RankContext,
    group: dist.ProcessGroup,
    *,
    batches: Batches,
    validation_sets: Mapping[str, ValidationSet],
    memory: Snapshots | None,
    saved_step: int,
    orders: OrderSource,
    signals: StopSignals,
) -> Training:
    """The parts of one rank, put together; called by all ranks together.

    Args:
        group: gloo, of all ranks: the step stats', and of saves that training waits for.
        validation_sets: by name.
        memory: where snapshots go; None: nowhere.
        saved_step: of the checkpoint that training goes on from; -1: of none.
    """
    reducer = StatsReducer(group, context.begin.rank, context.begin.world_size)
    stats = StatsReceiver(context, reducer)
    engine = context.engine
    weights = engine.weights if isinstance(engine, MeasuresLayers) else None
    return Training(
        context=context,
        batches=batches,
        reducer=reducer,
        stats=stats,
        validator=Validator(context, stats, reducer, validation_sets),
        update_ratio=UpdateRatio(weights),
        snapshots=MemorySnapshots(context, stats, memory),
        checkpoints=Checkpoints(context, stats, group, control_group(context.config), saved_step),
        orders=orders,
        signals=signals,
    )
