"""One rank's share of validation: the loss over whole sets of text, between two steps."""

from collections.abc import Mapping, Sequence

from opt_train.checkpoint.tensors import reshard
from opt_train.data.batches import ValidationSet
from opt_train.data.manifest import HELD_OUT
from opt_train.parallel.measure import loss_over
from opt_train.protocol.facts import Validation
from opt_train.train.context import RankContext
from opt_train.train.state import TrainState
from opt_train.train.stats_receiver import StatsReceiver
from opt_train.train.stats_reducer import StatsReducer


class Validator:
    """Measures the validation sets. Every rank calls the same methods in the same order."""

    def __init__(
        self,
        context: RankContext,
        stats: StatsReceiver,
        reducer: StatsReducer,
        sets: Mapping[str, ValidationSet],
    ) -> None:
        """Measure nothing yet.

        Args:
            sets: by name: ``validation``, the part of the corpus that is held out, and the named
                sets.
        """
        self._context = context
        self._stats = stats
        self._reducer = reducer
        self._sets = sets
        self._measured_step: dict[str, int] = {}
        """Of each set, when it was measured last."""

    def validate_if_due(self, state: TrainState) -> None:
        """Measure the sets that the configuration wants measured after the step taken last."""
        train = self._context.config.train
        held_out_is_due = state.is_due(train.validate_every)
        others_are_due = state.is_due(train.validate_sets_every or train.validate_every)
        self._validate(
            [
                name
                for name in self._sets
                if (held_out_is_due if name == HELD_OUT else others_are_due)
            ]
        )

    def validate_at_end(self, state: TrainState) -> None:
        """Measure every set that was not measured after this step already."""
        measured = self._measured_step
        self._validate([name for name in self._sets if measured.get(name) != state.step])

    def _validate(self, names: Sequence[str]) -> None:
        if not names:
            return
        context = self._context
        step = context.state.step
        self._stats.receive(before=step)
        context.enter("evaluation")
        model = context.engine.model
        model.eval()
        for name in names:
            loss_sum, tokens = self._loss_over(self._sets[name])
            self._measured_step[name] = step
            if context.is_rank_zero:
                context.publish(Validation(name, step, loss_sum / tokens, round(tokens)))
        model.train()
        # A forward pass without gradients leaves FSDP2's root unsharded: its parameters are plain
        # tensors then, and a save or restore would miss the shards.
        reshard(model)
        context.clock.reset()

    def _loss_over(self, validation: ValidationSet) -> tuple[float, float]:
        """Sum of the losses, in nats, and tokens, over the world."""
        context = self._context
        world = context.layout.data_world
        share = validation.share(
            data_rank=context.data_rank,
            data_world=world,
            micro_batch=context.config.train.micro_batch,
        )
        loss_sum, tokens = loss_over(
            context.engine.model,
            share,
            context.device,
            lambda done: context.progress(done * world, validation.sequences),
        )
        # The ranks of a tensor group have read the same sequences: each counts its part of them.
        part = 1 / context.layout.tensor
        total, count = self._reducer.sum(loss_sum * part, tokens * part)
        return total, count
