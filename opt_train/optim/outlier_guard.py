"""Skips a step whose gradient or loss is far outside its recent history, decided on the device.

A spike comes in one batch: an update from it moves weights and moments by more than hundreds of
others, and the moments remember. Left out, the step never was. What counts as far is measured
against the last `HISTORY` accepted steps, by median and median absolute deviation of logarithms:
a mean would follow the outliers, and in units of a mean's deviation gradient norms of small batches
have heavy tails, which is why the norm must be far in ratio too: of 6,400 healthy batches of 128
tokens nine lay above 4 times the median, two above 4.8, and nothing was wrong with their losses.

Never without end: a state that has exploded makes every batch look like an outlier, and whoever
skips them all freezes it. After ``optim.skip_in_row`` steps the next one is taken, and the
supervisor has seen an alarm.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from opt_train.optim.config import OptimConfig

HISTORY = 128
"""Accepted steps that the next is compared with."""
HISTORY_MIN = 100
"""With fewer nothing is skipped but what is not finite: the first steps are another population."""
NORM_SPREAD_MIN, LOSS_SPREAD_MIN = 0.05, 0.02
"""Least deviations of the logarithms. A run that moves less would be skipped for nothing."""
_CONSISTENT = 1.4826
"""Makes a standard deviation of a normal's median absolute deviation."""


class OutlierGuard:
    """The history on the device, and how many steps in a row were refused. Every rank that feeds it
    the same numbers has the same."""

    def __init__(self, optim: OptimConfig, device: torch.device) -> None:
        self._optim = optim
        empty = torch.full((HISTORY,), math.nan, dtype=torch.float64)
        self._norms = empty.to(device)
        """Logarithms, the oldest first; NaN: not there yet."""
        self._losses = empty.to(device)
        self._in_row = torch.zeros((), dtype=torch.int64).to(device)

    @torch.no_grad()
    def refuses(self, norm: Tensor, loss: Tensor) -> Tensor:
        """Whether the step is to be left out as an outlier; False where it is not finite, which is
        left out anyhow. Counts the step. Nothing waits for the device.

        Args:
            norm: global L2 norm of the averaged gradient before clipping, fp64 scalar.
            loss: mean over the global batch in nats, fp64 scalar; both the same on every rank.
        """
        optim = self._optim
        finite = norm.isfinite() & loss.isfinite()
        log_norm, log_loss = _logarithm(norm), _logarithm(loss)
        # A great distance alone may be no more than a heavy tail.
        above_norms, norm_z = _distance(log_norm, self._norms, NORM_SPREAD_MIN)
        _, loss_z = _distance(log_loss, self._losses, LOSS_SPREAD_MIN)
        far = (norm_z > optim.skip_norm_z) & (above_norms > math.log(optim.skip_norm_ratio))
        far = far | (loss_z > optim.skip_loss_z)
        enough = self._norms.isfinite().sum() >= HISTORY_MIN
        refused = finite & far & enough & (self._in_row < optim.skip_in_row)
        # What is not finite neither belongs to a row nor ends it.
        self._in_row = torch.where(refused, self._in_row + 1, torch.where(finite, 0, self._in_row))
        # A refused step in the history would blind it to the next one.
        accepted = finite & ~refused
        self._norms = _appended(self._norms, log_norm, accepted)
        self._losses = _appended(self._losses, log_loss, accepted)
        return refused

    def restore(self, norms: Iterable[float], losses: Iterable[float], in_row: int) -> None:
        """Go on from the steps that were accepted before, oldest first, and as many refused in a
        row: the next decision is the one that would have been taken without a break."""
        self._norms = _filled(norms, self._norms.device)
        self._losses = _filled(losses, self._losses.device)
        self._in_row = torch.tensor(in_row, dtype=torch.int64).to(self._in_row.device)


def _logarithm(value: Tensor) -> Tensor:
    # A gradient may be exactly zero.
    return value.clamp(min=1e-30).log()


def _distance(value: Tensor, history: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """How far `value` lies above the median, in logarithms and in deviations; NaN, which is greater
    than nothing, without a history."""
    median = history.nanmedian()
    spread = (history - median).abs().nanmedian() * _CONSISTENT
    return value - median, (value - median) / spread.clamp(min=least)


def _appended(history: Tensor, value: Tensor, accepted: Tensor) -> Tensor:
    return torch.where(accepted, torch.cat([history[1:], value.reshape(1)]), history)


def _filled(values: Iterable[float], device: torch.device) -> Tensor:
    newest = [*[math.nan] * HISTORY, *values]
    # On the device, which took the logarithms of those that it saw itself.
    return _logarithm(torch.tensor(newest[-HISTORY:], dtype=torch.float64).to(device))
