"""What comes of steps that are trained again in place: the same numbers, or others.

From the same state, on the same data and under the same values a step gives the same numbers to the
bit, where kernels are deterministic. Whoever has gone back because of an alarm so learns more than
whether it comes again. Numbers that are the same say that it lies in the state or the data. Numbers
that part behind steps that were the same say that something happened once, at that step; and where
only one rank's own numbers part, that it happened there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opt_train.stability.metric_history import number_of

DETERMINISTIC = 4
"""Steps that were the same before the one that is not: chosen, not measured. A kernel that adds up
in whatever order is to show before."""


class ReplayVerdict(StrEnum):
    """What the numbers of the second time say."""

    REPRODUCED = "reproduced"
    """They are those of the first time."""
    ONE_TIME = "one-time"
    """They part from them at some step."""
    NOT_DETERMINISTIC = "not deterministic"
    """They part so early that they would anyway."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """How far the steps were the same."""

    verdict: ReplayVerdict
    same: int
    """Steps that were the same."""
    step: int = 0
    """The first that was not, as its metrics line counts it; 0: none."""
    ranks: int = 0
    """Whose own numbers were not, at that step."""
    rank: int = -1
    """The one, where it is one."""


class Replayed:
    """Follows the metrics of one attempt, from its first line on."""

    def __init__(self, start_step: int) -> None:
        """Begin with the attempt that starts behind `start_step`."""
        self.result: ReplayResult | None = None
        """None: there is none yet, or nothing was trained again."""
        self._next = start_step + 1
        self._same = 0
        self._is_over = False

    def append(self, line: Mapping[str, Any]) -> None:
        """Take a metrics line in."""
        step, expected = int(line["step"]), self._next
        self._next += 1
        # Of lines that did not come nobody knows whether they were the same.
        self._is_over = self._is_over or step != expected
        if self._is_over:
            return
        ranks = number_of(line.get("replay_differs"))
        if ranks == 0:
            self._same += 1
            return
        self._is_over = True
        if ranks is None:
            if self._same:
                self.result = ReplayResult(ReplayVerdict.REPRODUCED, self._same)
            return
        is_deterministic = self._same >= DETERMINISTIC
        rank = number_of(line.get("replay_rank"))
        self.result = ReplayResult(
            ReplayVerdict.ONE_TIME if is_deterministic else ReplayVerdict.NOT_DETERMINISTIC,
            self._same,
            step,
            int(ranks),
            -1 if rank is None else int(rank),
        )
