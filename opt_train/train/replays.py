"""What this rank computed at its last steps, compared with what it computes when it trains them
again.

Steps that are trained again in place, from the same state, on the same data and under the same
values, give the same numbers to the bit, where kernels are deterministic. So a number that comes
out otherwise the second time was a one-time result, and says where it came from: what is compared
is of this rank alone, before any reduction.
"""

import struct
from collections.abc import Mapping, Sequence

REMEMBERED = 2048
"""Steps."""


class Replays:
    """The numbers of the newest steps."""

    def __init__(self) -> None:
        self._steps: dict[int, tuple[object, bytes]] = {}
        """Step -> what it was trained under, and what came of it; the oldest first."""
        self._compares = False

    def begin_attempt(self) -> None:
        """The rank has gone back: what it trains from here on it has trained before."""
        self._compares = True

    def compare(
        self,
        step: int,
        place: int,
        values: Mapping[str, float],
        numbers: Sequence[float],
    ) -> bool | None:
        """Whether `numbers` are those of the first time that `step` was trained; None where there
        is nothing to compare with, or something else went before.

        Args:
            place: in the order of the data.
            values: that the step was taken with.
            numbers: of this rank alone.
        """
        under = (place, tuple(sorted(values.items())))
        # By bits: a NaN that comes again is the same, and is not equal to itself.
        bits = struct.pack(f"{len(numbers)}d", *numbers)
        first = self._steps.pop(step, None)
        self._steps[step] = under, bits
        if len(self._steps) > REMEMBERED:
            del self._steps[next(iter(self._steps))]
        if not self._compares:
            return None
        # Behind another batch, another rate or another result all is another.
        if first is None or first[0] != under:
            self._compares = False
            return None
        self._compares = first[1] == bits
        return self._compares
