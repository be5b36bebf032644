"""The newest steps of the run's metrics, a ring for each column, for whoever asks by name.

A cache of `metrics/`: the shell refills it when a supervisor starts, and each metrics line adds to
it. It follows the live chain. Steps are in order and each is there once: a restart or a rollback
goes back to a step, and what was measured beyond it is forgotten with the weights it was measured
on. So a window of 128 steps may begin in an earlier attempt, and never holds a step twice.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")

HISTORY_STEPS = 1024
"""As many as the longest window that a detector asks for."""
COLUMNS_MAX = 512
"""A line has some 30 columns and a few for each layer; a rank that names new ones at every step
must not take the memory."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How JSON lines write what is no number to JSON."""


class MetricHistory:
    """Columns of numbers by step. None stands where a step's line has no number in the column."""

    def __init__(self, capacity: int = HISTORY_STEPS) -> None:
        self._steps: deque[int] = deque(maxlen=capacity)
        self._columns: dict[str, deque[float | None]] = {}
        self._of_attempt = False
        """Whether the newest step is one of the current attempt."""

    @property
    def step(self) -> int:
        """The newest step of the current attempt; -1: none yet."""
        return self._steps[-1] if self._of_attempt else -1

    def steps(self, last: int) -> tuple[int, ...]:
        """The newest `last` steps of the live chain, or as many as there are, oldest first."""
        return tuple(_newest(self._steps, last))

    def values(self, name: str, last: int) -> tuple[float | None, ...]:
        """What the column `name` has at `steps(last)`."""
        column = self._columns.get(name)
        if column is None:
            return (None,) * min(last, len(self._steps))
        return tuple(_newest(column, last))

    def newest(self, name: str) -> float | None:
        """What the newest line of the live chain has in the column `name`."""
        column = self._columns.get(name)
        return column[-1] if column else None

    def newest_finite(self, name: str) -> float:
        """The newest value of a column that is a finite number; 0 where there is none."""
        values = reversed(self.values(name, len(self._steps)))
        return next((v for v in values if v is not None and math.isfinite(v)), 0.0)

    def newest_of_attempt(self, name: str) -> float | None:
        """What the newest line of the current attempt has in the column `name`."""
        return self.newest(name) if self._of_attempt else None

    # What changes it ------------------------------------------------------------------------------

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a metrics line of the current attempt; it has an integer `step`."""
        self._append(line)
        self._of_attempt = True

    def refill(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Begin with `lines` of the live chain, oldest first, none of the current attempt."""
        for line in lines:
            self._append(line)

    def begin_attempt(self, start_step: int) -> None:
        """An attempt has begun from the state at `start_step`."""
        self.forget_beyond(start_step)
        self._of_attempt = False

    def forget_beyond(self, step: int) -> None:
        """Training is at `step` again: what came behind it never was."""
        while self._steps and self._steps[-1] > step:
            self._steps.pop()
            for column in self._columns.values():
                column.pop()
        self._of_attempt = self._of_attempt and bool(self._steps)

    def _append(self, line: Mapping[str, Any]) -> None:
        step = int(line["step"])
        # A step that is there already is of a branch that a rollback has left: the chain has each
        # once.
        self.forget_beyond(step - 1)
        for name, value in line.items():
            if name not in self._columns and number_of(value) is not None:
                self._add_column(name)
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(number_of(line.get(name)))

    def _add_column(self, name: str) -> None:
        if len(self._columns) < COLUMNS_MAX:
            missing = (None,) * len(self._steps)
            self._columns[name] = deque(missing, maxlen=self._steps.maxlen)


def number_of(value: object) -> float | None:
    """The number that a metrics line's `value` is, NaN and infinities too, which travel as text;
    None: it is none (text, a list, null)."""
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    if not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def _newest(ring: deque[T], last: int) -> Iterable[T]:
    return islice(ring, max(0, len(ring) - last), None)
