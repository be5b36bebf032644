"""Two published guards, as peers: each decides in the place of ours, in the same loop.

Both work on the host's numbers: this benchmark runs on a CPU, where nothing waits for them.
"""

import math
import statistics
from collections import deque
from typing import Any

import torch
from torch import Tensor

from benchmarks.stability.settings import SKIP_STEP, ZCLIP
from opt_train.optim.clip import GradNorm, UpdateDecision
from opt_train.optim.outlier_guard import OutlierGuard
from opt_train.train import step

LENGTH, SIGMAS = 128, 6


class SkipStep:
    """OLMo-core's rule (`SkipStepOptimizer`, allenai/OLMo-core): a step is skipped whose loss or
    gradient norm lies more than 6 standard deviations above the mean of the last 128, whatever
    became of those. It begins with half of them.

    Values that are not finite are left out of the mean, as its newer versions do: else each would
    blind it for 128 steps.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=LENGTH)
        self._norms: deque[float] = deque(maxlen=LENGTH)

    def skips(self, loss: float, norm: float) -> bool:
        """Whether the step is left out; counts it."""
        enough = len(self._losses) + 1 >= LENGTH // 2
        far = enough and (_is_far(loss, self._losses) or _is_far(norm, self._norms))
        self._losses.append(loss)
        self._norms.append(norm)
        return far


def _is_far(value: float, before: deque[float]) -> bool:
    finite = [number for number in before if math.isfinite(number)]
    if len(finite) < 2:
        return False
    return not value - statistics.fmean(finite) <= SIGMAS * statistics.stdev(finite)


class ZClip:
    """ZClip (arXiv 2504.02507; bluorion-com/ZClip) with its own settings: exponential averages of
    the gradient norm's mean and variance (0.97), begun from the first 25; a norm with z > 2.5 is
    clipped to mean + 2.5 deviations / (z / 2.5), and counts as that.

    Norms that are not finite are left out: those steps the loop skips.
    """

    ALPHA, Z, WARM_UP = 0.97, 2.5, 25

    def __init__(self) -> None:
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def limit(self, norm: float) -> float:
        """What the norm is to be clipped to; infinite: not at all. Counts the step."""
        if not math.isfinite(norm):
            return math.inf
        if len(self._first) < self.WARM_UP:
            self._first.append(norm)
            if len(self._first) == self.WARM_UP:
                self._mean = statistics.fmean(self._first)
                self._variance = statistics.pvariance(self._first)
            return math.inf
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / (deviation + 1e-6)
        limit = math.inf
        if z > self.Z:
            limit = self._mean + self.Z * deviation / (z / self.Z)
        counted = min(norm, limit)
        self._mean = self.ALPHA * self._mean + (1 - self.ALPHA) * counted
        # With the new mean, as theirs has it.
        above = counted - self._mean
        self._variance = self.ALPHA * self._variance + (1 - self.ALPHA) * above**2
        return limit


def put_in(peer: str) -> None:
    """Let `peer` decide in this process; empty: nobody else."""
    if peer == SKIP_STEP:
        _put_skip_step_in()
    if peer == ZCLIP:
        _put_zclip_in()


def _put_skip_step_in() -> None:
    rule = SkipStep()

    def refuses(_: OutlierGuard, norm: Tensor, loss: Tensor) -> Tensor:
        return torch.tensor(rule.skips(loss.item(), norm.item()))

    OutlierGuard.refuses = refuses  # type: ignore[method-assign]


def _put_zclip_in() -> None:
    rule, clip = ZClip(), step.clip

    def clip_less(grad_norm: GradNorm, max_norm: float, *more: Any) -> UpdateDecision:
        return clip(grad_norm, min(max_norm, rule.limit(grad_norm.norm.item())), *more)

    step.clip = clip_less
