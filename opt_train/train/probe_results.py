"""What some steps measure beside the rest: from a rank's own numbers, over the step's word, to the
metrics line.

Which steps do is known to every rank alike (`opt_train.train.probes`), so their words are longer on
all ranks at once.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DIGITS = 5
"""Significant ones of the numbers below: hundreds of them must fit the 4096 bytes of a metrics
line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldProbes:
    """What the world measured on a step; None: not on this one."""

    layer_grad_norms: tuple[float, ...] | None = None
    """L2 norm of each layer's averaged gradient, before clipping, without loss scale: of the
    embedding, the layers, and what is behind them (`opt_train.optim.per_layer_norms`)."""
    layer_weight_norms: tuple[float, ...] | None = None
    """The same of the weights, before the update."""
    attention_logit_max: float | None = None
    gemm_tflops: tuple[float, ...] | None = None
    """Of each rank."""

    def metrics(self) -> dict[str, Any]:
        """The part of a metrics line that speaks of this (docs/metrics.md)."""
        speeds = self.gemm_tflops
        slowest = min(speeds) if speeds else None
        return {
            "layer_grad_norms": _listed(self.layer_grad_norms),
            "layer_weight_norms": _listed(self.layer_weight_norms),
            "attention_logit_max": _rounded(self.attention_logit_max),
            "gemm_tflops_min": _rounded(slowest),
            "gemm_tflops_median": _rounded(statistics.median(speeds)) if speeds else None,
            "gemm_slowest_rank": speeds.index(slowest) if speeds and slowest is not None else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RankProbes:
    """What one rank puts into the word: the same kinds of numbers on every rank, empty or None on
    most steps."""

    layer_squares: tuple[float, ...] = ()
    """Its shares of the squared norms: of each layer's gradient, then of each layer's weights."""
    attention_logit: float | None = None
    gemm_tflops: float | None = None

    def sums(self, rank: int, world_size: int) -> list[float]:
        """What the word adds up over ranks."""
        if self.gemm_tflops is None:
            return [*self.layer_squares]
        # Each rank has a place of its own, so that the slowest has a name.
        speeds = [0.0] * world_size
        speeds[rank] = self.gemm_tflops
        return [*self.layer_squares, *speeds]

    def maxima(self) -> list[float]:
        """What the word takes the largest of."""
        if self.attention_logit is None:
            return []
        # A maximum over ranks need not carry a NaN; infinity it does.
        return [math.inf if math.isnan(self.attention_logit) else self.attention_logit]

    def of_world(self, sums: Sequence[float], maxima: Sequence[float]) -> WorldProbes:
        """What the word has made of `sums` and `maxima`."""
        count = len(self.layer_squares)
        norms = [math.sqrt(square) if square >= 0 else math.nan for square in sums[:count]]
        return WorldProbes(
            layer_grad_norms=tuple(norms[: count // 2]) or None,
            layer_weight_norms=tuple(norms[count // 2 :]) or None,
            attention_logit_max=maxima[0] if maxima else None,
            gemm_tflops=tuple(sums[count:]) or None,
        )


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.{DIGITS}g}")


def _listed(numbers: Sequence[float] | None) -> list[float | None] | None:
    return None if numbers is None else [_rounded(number) for number in numbers]
