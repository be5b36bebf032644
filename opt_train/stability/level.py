"""The usual size of something that is measured at every step, and how far off a value is."""

import math
import statistics
from collections import deque

FIRST_STEP = 100
"""Below it, in the warm-up, norms are another population."""
WINDOW = 128
ENOUGH = 48
"""Values that a window needs before it is compared with."""
REFUSED_BEFORE_NEW = 64
"""A level that lasts this long is the new one: an honest change must not alarm for ever."""
SPREAD_MIN = 0.05
"""Of logarithms: of a window of like values any other would be an outlier."""
FAR = 8.0
"""Deviations."""
CONSISTENT = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""


class Level:
    """The usual size of a positive value, from the last accepted ones."""

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._refused = 0

    def distance(self, value: float) -> tuple[float, float]:
        """Deviations from the median of the logarithms, and the ratio; (0, 1) without enough
        values."""
        if len(self._logs) < ENOUGH or not value > 0 or not math.isfinite(value):
            return 0.0, 1.0
        median = statistics.median(self._logs)
        spread = CONSISTENT * statistics.median(abs(log - median) for log in self._logs)
        above = math.log(value) - median
        return above / max(spread, SPREAD_MIN), math.exp(min(above, 50.0))

    def take(self, value: float) -> tuple[float, float]:
        """Deviations and ratio as `distance` has them; then `value` is one of the window, if it is
        not far off, or has been for so long that it is usual."""
        deviations, ratio = self.distance(value)
        # What is far off would blind the window to the next of its kind.
        self._refused = self._refused + 1 if abs(deviations) > FAR else 0
        is_usual = not self._refused or self._refused > REFUSED_BEFORE_NEW
        if is_usual and value > 0 and math.isfinite(value):
            self._logs.append(math.log(value))
        return deviations, ratio
