"""Token shards as training and validation batches: memory-mapped, random access, the same for every
number of ranks."""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from opt_train.data.batch_shares import micro_batches_of, share_of
from opt_train.data.manifest import HELD_OUT, TRAIN, DatasetManifest
from opt_train.data.order import Cursor, SampleOrder
from opt_train.data.tokenizer import PAD
from opt_train.data.verify import check_shards
from opt_train.protocol.exits import BadInput


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


class TokenStream:
    """The tokens of one split, memory-mapped across its shards."""

    def __init__(self, shards: list[npt.NDArray[np.unsignedinteger]]) -> None:
        self._shards = shards
        self._ends = list(accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `start + count`, as int64 `[count]`, across shard borders where need
        be."""
        if start < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        result = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            shard = bisect.bisect_right(self._ends, start + done)
            offset = start + done - (self._ends[shard] - len(self._shards[shard]))
            piece = self._shards[shard][offset : offset + count - done]
            result[done : done + len(piece)] = piece
            done += len(piece)
        return result


def open_split(
    directory: Path, split: str, verify: bool, progress: Callable[[int, int], None] | None = None
) -> TokenStream:
    """Map the shards of ``train``, ``validation`` or a named set.

    Sizes are always compared with the manifest; with `verify` every byte is (about 1.5 GB/s), and
    `progress` is called with the bytes done and in all after each piece.

    Raises:
        BadInput: there is no such set, or a shard is missing, of the wrong size, or its checksum is
            wrong; the message names the file.
    """
    manifest = DatasetManifest.read(directory)
    if split not in manifest.splits:
        raise BadInput(
            f"{directory} holds no validation set {split!r}; name it in data.validation_sets and "
            "run `opt-train prepare`"
        )
    check_shards(directory, manifest, split, verify=verify, progress=progress)
    # Little-endian on disk, whichever machine reads them.
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    return TokenStream(
        [
            # Mapped, not read: OPT's 180 billion tokens are 360 GB, and a node's ranks share the
            # page cache.
            np.memmap(directory / shard.path, dtype=dtype, mode="r")
            for shard in manifest.shards_of(split)
        ]
    )


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
        samples = _samples_in(tokens, sequence_length, TRAIN)
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
        positions = share_of(self.global_batch, data_rank, data_world)
        samples = [self.order.index(cursor.samples + position) for position in positions]
        # By the largest share for every rank: a forward pass that one of them left out would leave
        # the others waiting in its collectives.
        largest = len(share_of(self.global_batch, 0, data_world))
        number, rows = micro_batches_of(largest, micro_batch)
        return [
            _micro_batch(self._tokens, self._sequence_length, samples[first : first + rows], rows)
            for first in range(0, number * rows, rows)
        ]

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor behind the global batch at `cursor`."""
        return cursor.advance(self.global_batch)


class ValidationSet:
    """All whole sequences of the validation split or of a named set, in order, shared between
    ranks."""

    def __init__(self, tokens: TokenStream, sequence_length: int, split: str = HELD_OUT) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length
        self.sequences = _samples_in(tokens, sequence_length, split)

    def share(self, *, data_rank: int, data_world: int, micro_batch: int) -> Iterator[MicroBatch]:
        """The rank's sequences, in as many micro-batches of the same shape on every rank."""
        mine = share_of(self.sequences, data_rank, data_world)
        largest = len(share_of(self.sequences, 0, data_world))
        rows = min(micro_batch, largest)
        for first in range(0, largest, rows):
            yield _micro_batch(
                self._tokens, self._sequence_length, list(mine[first : first + rows]), rows
            )


def _micro_batch(
    tokens: TokenStream, sequence_length: int, samples: list[int], rows: int
) -> MicroBatch:
    """`samples` as the first of `rows` sequences; the rest is padding of weight 0."""
    block = np.full((rows, sequence_length + 1), PAD, dtype=np.int64)
    for row, sample in enumerate(samples):
        block[row] = tokens.read(sample * sequence_length, sequence_length + 1)
    weights = torch.zeros(rows, dtype=torch.float32)
    weights[: len(samples)] = 1.0
    whole = torch.from_numpy(block)
    return MicroBatch(
        tokens=whole[:, :-1].contiguous(), targets=whole[:, 1:].contiguous(), weights=weights
    )


def _samples_in(tokens: TokenStream, sequence_length: int, split: str) -> int:
    samples = (len(tokens) - 1) // sequence_length
    if samples < 1:
        raise BadInput(
            f"data.sequence_length={sequence_length} needs {sequence_length + 1} tokens but the "
            f"{split} split has "
            f"{len(tokens)}; use a shorter sequence or a larger corpus"
        )
    return samples
