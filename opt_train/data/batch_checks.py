"""Static checks of a batch: what is wrong with data that can be seen without training on it.

A loader that hands the inputs out as labels, a shard of zeros, one document over and over: a model
learns each of them, and the loss falls while it does. The batch itself shows them at once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]

_MULTIPLIER_SEED = 20260725
_REMEMBERED = 4096
"""Sequences of a rank."""


@dataclass(frozen=True, slots=True)
class BatchChecks:
    """What some sequences look like."""

    sequences: int
    token_entropy: float
    """Nats, of the distribution of the tokens within a sequence, in the mean over the sequences.
    0: each is one token over and over; at most the logarithm of the sequence length."""
    equal_labels: int
    """Labels that are the input at the same place: the token behind it is the same, or the labels
    were never moved by one."""
    duplicates: int
    """Sequences that are the same as one before."""
    hashes: tuple[int, ...] = ()
    """64 bits of each sequence: two that differ have the same once in 10^19 pairs."""


class Repeats:
    """Notices batches that come again, as those of a data loader that goes in circles."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        """Sequence -> where in the order of the data it was read last; the oldest first."""
        self._distance = 0
        """From where most of the newest batch's sequences were read before; 0: nowhere."""

    def count(self, place: int, hashes: Iterable[int]) -> int:
        """How many of the sequences read at `place` in the order of the data were read before as
        far from there as those of the batch before from its place: text may come again, and all of
        it does in another epoch, but not in the same order.

        Whoever goes back and reads a place once more reads nothing again.
        """
        hashes = list(hashes)
        distances = Counter(
            place - self._places[one]
            for one in hashes
            if one in self._places and self._places[one] != place
        )
        repeated = distances[self._distance]
        [(self._distance, _)] = distances.most_common(1) or [(0, 0)]
        for one in hashes:
            self._places.pop(one, None)
            self._places[one] = place
        while len(self._places) > _REMEMBERED:
            del self._places[next(iter(self._places))]
        return repeated


def check_batch(tokens: Tokens, labels: Tokens) -> BatchChecks:
    """What the static checks say of sequences.

    By sequence, so that it does not matter between how many ranks a batch is shared.

    Args:
        tokens, labels: `[sequences, length]`.
    """
    sequences = len(tokens)
    if sequences == 0:
        return BatchChecks(0, 0.0, 0, 0)
    hashes = _hashes(tokens)
    return BatchChecks(
        sequences,
        float(token_entropies(tokens).mean()),
        int(np.count_nonzero(tokens == labels)),
        sequences - len(set(hashes)),
        hashes,
    )


def outside_of_vocabulary(tokens: Tokens, vocab_size: int) -> int:
    """How many of the tokens no row of the embedding is for."""
    # Two passes without a copy; what makes one is for batches that are damaged.
    if tokens.size and tokens.min() >= 0 and tokens.max() < vocab_size:
        return 0
    return int(np.count_nonzero((tokens < 0) | (tokens >= vocab_size)))


def token_entropies(tokens: Tokens) -> npt.NDArray[np.float64]:
    """Entropy of each sequence's own distribution of tokens, nats `[sequences]`.

    Args:
        tokens: `[sequences, length]`.
    """
    sequences, length = tokens.shape
    # Sorted, equal tokens stand together; 32 bits sort twice as fast as 64.
    ordered = np.sort(tokens.astype(np.int32), axis=1)
    begins = np.ones((sequences, length), dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=begins[:, 1:])
    first = np.flatnonzero(begins)
    counts = np.diff(np.append(first, sequences * length)).astype(np.float64)
    sums = np.bincount(first // length, counts * np.log(counts), minlength=sequences)
    entropies: npt.NDArray[np.float64] = np.log(length) - sums / length
    return entropies


def _hashes(tokens: Tokens) -> tuple[int, ...]:
    generator = np.random.default_rng(_MULTIPLIER_SEED)
    odd = generator.integers(0, 1 << 63, tokens.shape[1], dtype=np.uint64) * 2 + 1
    # Products wrap around: a sum of odd multiples tells an order of tokens from another one.
    return tuple((tokens.astype(np.uint64) * odd).sum(axis=1, dtype=np.uint64).tolist())
