"""Token shards as training and validation batches: memory-mapped, random access, the same for every
number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from opt_train.data.batch_shares import micro_batches_of, share_of
from opt_train.data.manifest import HELD_OUT, TRAIN
from opt_train.data.order import Cursor, SampleOrder
from opt_train.data.token_stream import TokenStream, samples_in
from opt_train.data.tokenizer import PAD


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass reads."""

    tokens: torch.Tensor
    """int64 `[micro, sequence]`."""
    targets: torch.Tensor
    """int64 `[micro, sequence]`: the tokens one further on."""
    weights: torch.Tensor
    """float32 `[micro]`: 1, or 0 for a sequence that is only there so that all ranks run the same
    collectives."""


class Batches:
    """Global batches of the training split.

    Sample `i` is tokens `[i * S, i * S + S]`, both ends included, for sequence length `S`: its last
    token is the next one's first, so every token is predicted exactly once an epoch, but for the
    stream's first and fewer than `S` at its end. Which samples form a global batch depends on seed,
    data and cursor alone, never on the number of ranks.
    """

    def __init__(
        self, tokens: TokenStream, sequence_length: int, global_batch: int, seed: int
    ) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length
        self.global_batch = global_batch
        samples = samples_in(tokens, sequence_length, TRAIN)
        self.order = SampleOrder(samples, seed)

    def at(
        self, cursor: Cursor, *, data_rank: int, data_world: int, micro_batch: int
    ) -> list[MicroBatch]:
        """The share of rank `data_rank` of `data_world` in the global batch that begins at
        `cursor`.

        Every rank gets as many micro-batches, of the same shape, as the largest share needs.
        """
        # Invariant 1: positions count through the global batch, so another number of ranks cuts the
        # same samples in another way.
        positions = [
            cursor.samples + place for place in share_of(self.global_batch, data_rank, data_world)
        ]
        # By the largest share for every rank: a forward pass that one of them left out would leave
        # the others waiting in its collectives.
        largest = len(share_of(self.global_batch, 0, data_world))
        number, rows = micro_batches_of(largest, micro_batch)
        return [
            _micro_batch(self.read, positions[first : first + rows], rows, self._sequence_length)
            for first in range(0, number * rows, rows)
        ]

    def read(self, position: int) -> npt.NDArray[np.int64]:
        """The sample at `position` in the order of the data: int64 `[sequence + 1]`."""
        return _read_sample(self._tokens, self.order.index(position), self._sequence_length)

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor behind the global batch at `cursor`."""
        return cursor.advance(self.global_batch)


class ValidationSet:
    """All whole sequences of the validation split or of a named set, in order, shared between
    ranks."""

    def __init__(self, tokens: TokenStream, sequence_length: int, split: str = HELD_OUT) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length
        self.sequences = samples_in(tokens, sequence_length, split)

    def share(self, *, data_rank: int, data_world: int, micro_batch: int) -> Iterator[MicroBatch]:
        """The rank's sequences, in as many micro-batches of the same shape on every rank."""
        mine = share_of(self.sequences, data_rank, data_world)
        largest = len(share_of(self.sequences, 0, data_world))
        rows = min(micro_batch, largest)
        for first in range(0, largest, rows):
            yield _micro_batch(
                lambda sample: _read_sample(self._tokens, sample, self._sequence_length),
                mine[first : first + rows],
                rows,
                self._sequence_length,
            )


def _read_sample(tokens: TokenStream, sample: int, length: int) -> npt.NDArray[np.int64]:
    return tokens.read(sample * length, length + 1)


def _micro_batch(
    read: Callable[[int], npt.NDArray[np.int64]], samples: Sequence[int], rows: int, length: int
) -> MicroBatch:
    """`samples` as the first of `rows` sequences; the rest is padding of weight 0."""
    block = np.full((rows, length + 1), PAD, dtype=np.int64)
    for row, sample in enumerate(samples):
        block[row] = read(sample)
    weights = torch.zeros(rows, dtype=torch.float32)
    weights[: len(samples)] = 1.0
    whole = torch.from_numpy(block)
    return MicroBatch(
        tokens=whole[:, :-1].contiguous(), targets=whole[:, 1:].contiguous(), weights=weights
    )
