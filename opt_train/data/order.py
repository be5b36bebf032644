"""One global, random-access order of samples: a keyed permutation per epoch, in constant memory.

Shuffling a list of samples costs memory that grows with the data and has to be replayed after a
restart. A format-preserving permutation (a Feistel network with cycle walking; Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002) answers "which sample stands at position p" at once.
Pure integers: the same on every machine.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

# Three rounds of a random function make a pseudorandom permutation, four a strong one (Luby and
# Rackoff 1988). Ours mixes 64 bits cheaply instead, so there are more.
ROUNDS = 6
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The order in which `samples` samples are read, epoch after epoch, each epoch in another
    permutation."""

    samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"an order needs at least one sample, not {self.samples}")

    def index(self, position: int) -> int:
        """The sample at `position` (from 0); positions beyond `samples` roll into the next
        epochs."""
        if position < 0:
            raise ValueError(f"positions count from 0, not {position}")
        epoch, value = divmod(position, self.samples)
        # A network of no bits has nothing to permute.
        if self.samples == 1:
            return 0
        half = ((self.samples - 1).bit_length() + 1) // 2
        keys = _round_keys(self.seed, epoch)
        while True:
            value = _feistel(value, half, keys)
            # The network permutes [0, 4**half), which is less than four times `samples`: walking
            # the cycle until it comes back inside leaves a permutation of [0, samples), after fewer
            # than four rounds on average.
            if value < self.samples:
                return value


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """How far the order has been read: samples consumed since the run began, over all ranks and
    epochs."""

    samples: int = 0

    def advance(self, samples: int) -> "Cursor":
        """The cursor after `samples` more."""
        return Cursor(self.samples + samples)

    def epoch(self, order: SampleOrder) -> int:
        """The epoch, from 0, of the next sample."""
        return self.samples // order.samples


def _feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output
    bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return value ^ (value >> 31)


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """One 64-bit key a round, derived from seed and epoch."""
    return tuple(
        int.from_bytes(
            hashlib.sha256(f"opt_train sample order {seed} {epoch} {number}".encode()).digest()[:8],
            "big",
        )
        for number in range(ROUNDS)
    )
