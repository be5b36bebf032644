"""What a column of the step stats is: how ranks' values become the world's, and which metrics they
become. The table itself is `opt_train.train.stats.step_stats.COLUMNS`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Value = float | tuple[float, ...] | None
"""Of one column; None: not measured on this step."""


class Reduction(StrEnum):
    """How the world makes one value of all ranks'."""

    SUM = "sum"
    MAX = "maximum"
    FIRST = "rank 0's"
    EACH = "each rank's, in their order"
    """What ranks give are tuples, and so is the world's value: theirs, one behind the other."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One key of the metrics line, and its row in docs/metrics.md."""

    key: str
    unit: str
    meaning: str
    how: Callable[[Any], object] | None = None
    """Its value, from what the line is made of; None: the attribute of the key's name."""

    def value(self, source: Any) -> object:
        """The key's value; of a column's metric `source` is the step's `StepStats`."""
        return getattr(source, self.key) if self.how is None else self.how(source)


class Column:
    """One value of the vector, or a group of them that come and go together."""

    def __init__(
        self,
        name: str,
        reduction: Reduction,
        unit: str,
        meaning: str,
        *metrics: Metric,
        is_whole: bool = False,
    ) -> None:
        """Declare the field `name` of `StatsColumns`.

        Args:
            unit, meaning: of one rank's value.
            metrics: what it becomes in the metrics line, if anything.
            is_whole: a count: the world's value is an int.
        """
        self.name = name
        self.reduction = reduction
        self.unit = unit
        self.meaning = meaning
        self.metrics = metrics
        self.is_whole = is_whole

    def width(self, own: Value, world_size: int) -> int:
        """How many numbers it has in the vector of a step on which this rank's value is `own`."""
        numbers = len(_numbers(own))
        return numbers * world_size if self.reduction is Reduction.EACH else numbers

    def contribution(self, own: Value, rank: int, world_size: int) -> list[float]:
        """What `rank` puts into the vector, `width` numbers."""
        numbers = _numbers(own)
        match self.reduction:
            case Reduction.SUM:
                return numbers
            case Reduction.MAX:
                # A maximum over ranks need not carry a NaN (gloo's does not); infinity it does.
                return [math.inf if math.isnan(number) else number for number in numbers]
            case Reduction.FIRST:
                return numbers if rank == 0 else [0.0] * len(numbers)
            case Reduction.EACH:
                # A place for each rank, zero but for its own, so that the slowest has a name.
                before, behind = rank, world_size - rank - 1
                return [0.0] * (before * len(numbers)) + numbers + [0.0] * (behind * len(numbers))

    def value(self, reduced: Sequence[float], own: Value) -> Value:
        """The world's value, from the column's numbers; of the same kind as this rank's `own`."""
        if own is None:
            return None
        if isinstance(own, tuple):
            return tuple(reduced)
        return round(reduced[0]) if self.is_whole else reduced[0]


def _numbers(own: Value) -> list[float]:
    if own is None:
        return []
    if isinstance(own, tuple):
        return [float(number) for number in own]
    return [float(own)]
