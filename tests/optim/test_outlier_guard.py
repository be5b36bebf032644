"""Which steps are left out as outliers: against a plain reckoning with numpy, and never without
end."""

import math
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from opt_train.optim.clip import GradNorm, clip
from opt_train.optim.config import OptimConfig
from opt_train.optim.outlier_guard import HISTORY, HISTORY_MIN, OutlierGuard

CPU = torch.device("cpu")
OPTIM = OptimConfig()


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def refuses(guard: OutlierGuard, norm: float, loss: float) -> bool:
    return bool(guard.refuses(scalar(norm), scalar(loss)))


def settled(steps: int = HISTORY) -> OutlierGuard:
    """One that has seen so many healthy steps."""
    guard = OutlierGuard(OPTIM, CPU)
    for norm, loss in healthy(0, steps):
        assert not refuses(guard, norm, loss)
    return guard


def healthy(seed: int, steps: int) -> Iterator[tuple[float, float]]:
    """Norms and losses of a run that goes well, as they scatter at 256 tokens a step."""
    draw = np.random.default_rng(seed)
    for step in range(steps):
        yield float(0.8 * np.exp(draw.normal(0, 0.15))), 3.0 - step * 1e-4 + draw.normal(0, 0.05)


class Reckoning:
    """The same by numpy, a step at a time."""

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.in_row = 0

    def refuses(self, norm: float, loss: float) -> bool:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return False
        far = False
        if len(self.norms) >= HISTORY_MIN and self.in_row < 4:
            norm_z, ratio = self._distance(norm, self.norms, 0.05)
            loss_z, _ = self._distance(loss, self.losses, 0.02)
            far = (norm_z > 12 and ratio > 8) or loss_z > 8
        self.in_row = self.in_row + 1 if far else 0
        if not far:
            self.norms.append(norm)
            self.losses.append(loss)
        return far

    def _distance(self, value: float, seen: deque[float], least: float) -> tuple[float, float]:
        logs = np.log(np.array(seen))
        # torch's median of an even count is the lower of the two in the middle.
        median = float(np.sort(logs)[(len(logs) - 1) // 2])
        away = np.sort(np.abs(logs - median))
        spread = max(1.4826 * float(away[(len(away) - 1) // 2]), least)
        return (math.log(value) - median) / spread, value / math.exp(median)


@pytest.mark.parametrize("seed", range(4))
def test_it_decides_as_a_plain_reckoning_does(seed: int) -> None:
    guard, reckoning = OutlierGuard(OPTIM, CPU), Reckoning()
    draw = np.random.default_rng(seed)
    refused = 0
    for step in healthy(seed, 600):
        norm, loss = step
        if draw.random() < 0.05:
            norm *= float(draw.choice([2.0, 5.0, 20.0, 1e4, math.inf]))
        if draw.random() < 0.05:
            loss *= float(draw.choice([1.1, 1.3, 2.0, math.nan]))
        expected = reckoning.refuses(norm, loss)
        assert refuses(guard, norm, loss) == expected
        refused += expected
    assert refused > 5


def test_a_spike_is_skipped_and_does_not_move_what_the_next_is_measured_by() -> None:
    guard = settled()
    assert refuses(guard, 800.0, 3.0)
    assert refuses(guard, 0.8, 6.0), "the loss alone"
    assert not refuses(guard, 0.8 * 7.0, 3.0), "within the tail that healthy norms have"
    assert not refuses(guard, 0.8, 3.0)


def test_a_state_that_has_exploded_is_not_frozen_for_ever() -> None:
    guard = settled()
    assert [refuses(guard, 800.0, 9.0) for _ in range(6)] == [True] * 4 + [False, True]


def test_the_first_steps_are_another_population() -> None:
    guard = settled(HISTORY_MIN - 2)
    assert not refuses(guard, 800.0, 3.0)
    assert not refuses(guard, 0.8, 3.0)
    assert refuses(guard, 800.0, 3.0), "and now there are enough"


def test_nothing_is_skipped_where_it_was_not_asked_for() -> None:
    guard = OutlierGuard(OptimConfig(skip_in_row=0), CPU)
    guard.restore([0.8] * HISTORY, [3.0] * HISTORY, 0)
    assert not refuses(guard, 1e6, 99.0)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_is_not_finite_is_no_outlier_and_is_left_out_all_the_same(norm: float) -> None:
    guard = settled()
    assert not refuses(guard, norm, 3.0)
    assert refuses(guard, 800.0, 3.0), "and has not come into the history"
    decision = clip(GradNorm(scalar(norm), scalar(1.0), scalar(3.0)), 1.0, torch.tensor(False))
    assert (float(decision.skip), float(decision.overflow)) == (1.0, 1.0)


def test_a_loss_that_is_not_finite_is_left_out_and_no_overflow() -> None:
    decision = clip(GradNorm(scalar(1.0), scalar(1.0), scalar(math.nan)), 1.0)
    assert (float(decision.skip), float(decision.overflow)) == (1.0, 0.0)


def test_restored_it_goes_on_as_if_nothing_had_been() -> None:
    """From the numbers that a checkpoint has, which are those that the host has seen."""
    whole, norms, losses, in_row = OutlierGuard(OPTIM, CPU), [], [], 0
    steps = [(800.0, 3.0) if k in (150, 151) else s for k, s in enumerate(healthy(1, 300))]
    for norm, loss in steps[:152]:
        if refuses(whole, norm, loss):
            in_row += 1
        else:
            norms.append(norm)
            losses.append(loss)
    assert in_row == 2
    restored = OutlierGuard(OPTIM, CPU)
    restored.restore(norms[-HISTORY:], losses[-HISTORY:], in_row)
    sick = [(900.0, 3.0)] * 4 + steps[152:]
    assert [refuses(whole, *s) for s in sick] == [refuses(restored, *s) for s in sick]
