"""One rank's share of validation: the loss over whole sets of text, between two steps."""

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from opt_train.checkpoint.tensors import reshard
from opt_train.data.batches import Batches, MicroBatch, ValidationSet
from opt_train.data.manifest import HELD_OUT
from opt_train.data.order import Cursor
from opt_train.parallel.measure import loss_over
from opt_train.protocol.facts import Validation
from opt_train.train.context import RankContext
from opt_train.train.state import TrainState, seed_step
from opt_train.train.stats.receiver import StatsReceiver
from opt_train.train.stats.reducer import StatsReducer


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

    def begin_attempt(self) -> None:
        """The same steps come again, and are others."""
        self._measured_step.clear()

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

    def losses_at(self, places: Sequence[int], batches: Batches, count: int) -> list[float]:
        """The mean losses, in nats per token, of the `count` global batches from each of `places`
        on, in the order of the data; the same on every rank.

        Measured as in training and not in evaluation mode: they are to be compared with losses of
        training, which dropout raises.
        """
        context = self._context
        context.enter("evaluation")
        # Each step is seeded: what dropout draws here takes nothing from the next.
        seed_step(context.config.seed, context.state.step, context.begin.rank, context.device)
        losses = []
        for done, place in enumerate(places, start=1):
            share = self._share_of(batches, place, count)
            loss_sum, tokens = self._sums(share, lambda _: None)
            losses.append(loss_sum / tokens)
            context.progress(done, len(places))
        reshard(context.engine.model)
        return losses

    def odd_ranks(self, place: int, batches: Batches) -> tuple[int, ...]:
        """Ranks that compute another loss than most from the same weights and the same sequences,
        the first micro-batch at `place`: to the bit, without dropout. All of them where no loss is
        that of most; the same on every rank."""
        context, model = self._context, self._context.engine.model
        first, *_ = batches.at(
            Cursor(place),
            data_rank=0,
            data_world=context.layout.data_world,
            micro_batch=context.config.train.micro_batch,
        )
        model.eval()
        loss, _ = loss_over(model, [first], context.device, lambda _: None)
        model.train()
        reshard(model)
        own, ranks = context.begin.rank, range(context.begin.world_size)
        return odd_ones(self._reducer.sum(*(loss if rank == own else 0.0 for rank in ranks)))

    def _share_of(self, batches: Batches, place: int, count: int) -> Iterator[MicroBatch]:
        context, cursor = self._context, Cursor(place)
        for _ in range(count):
            yield from batches.at(
                cursor,
                data_rank=context.data_rank,
                data_world=context.layout.data_world,
                micro_batch=context.config.train.micro_batch,
            )
            cursor = batches.after(cursor)

    def _loss_over(self, validation: ValidationSet) -> tuple[float, float]:
        """Sum of the losses, in nats, and tokens, over the world."""
        context = self._context
        world = context.layout.data_world
        share = validation.share(
            data_rank=context.data_rank,
            data_world=world,
            micro_batch=context.config.train.micro_batch,
        )
        return self._sums(share, lambda done: context.progress(done * world, validation.sequences))

    def _sums(
        self, share: Iterable[MicroBatch], progress: Callable[[int], None]
    ) -> tuple[float, float]:
        context = self._context
        loss_sum, tokens = loss_over(context.engine.model, share, context.device, progress)
        # The ranks of a tensor group have read the same sequences: each counts its part of them.
        part = 1 / context.layout.tensor
        total, count = self._reducer.sum(loss_sum * part, tokens * part)
        return total, count


def odd_ones(values: Sequence[float]) -> tuple[int, ...]:
    """Places of the values that are not, to the bit, that of more than half; all places where there
    is no such value."""
    bits = [struct.pack("d", value) for value in values]
    [(most, count)] = Counter(bits).most_common(1)
    if 2 * count <= len(values):
        return tuple(range(len(values)))
    return tuple(place for place, one in enumerate(bits) if one != most)
