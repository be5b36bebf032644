"""How far an update has moved the weights, relative to them: the first sign of a learning rate that
is too high, of broken moments, and of training that stands still.

The gradient's norm does not tell: under Adam it does not set the update's size, and falls when the
rate is too high.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 1024
"""Weights of each tensor that are looked at, at most, spread over it evenly: Adam's updates are
alike within a tensor, and all weights would be another copy of the model."""


class UpdateSquares(NamedTuple):
    """Sums over this rank's sample, fp64 scalars on the device."""

    update: Tensor
    """Squares of what the last update has changed."""
    weights: Tensor
    """Squares of the weights before it."""


class UpdateRatio:
    """Compares a sample of the weights from one step to the next."""

    def __init__(self, weights: Callable[[], list[Tensor]] | None) -> None:
        """
        Args:
            weights: gives this rank's part of each weight; None: the engine shows none.
        """
        self._weights = weights
        self._before: Tensor | None = None

    def begin_attempt(self) -> None:
        """The weights are those of another step: there is no update before the next."""
        self._before = None

    @torch.no_grad()
    def measure(self) -> UpdateSquares | None:
        """The last update's size, asked for once a step before the weights move again; None where
        there is no step before, or no weights are shown. Does not wait for the device.

        It is the update of the step before, read with this one: to look again behind each update
        would let the host wait for it.
        """
        if self._weights is None:
            return None
        before, now = self._before, _sample(self._weights())
        self._before = now
        if before is None:
            return None
        return UpdateSquares((now - before).square().sum(), before.square().sum())


def _sample(weights: list[Tensor]) -> Tensor:
    """[n] fp64: a copy."""
    parts = [part[:: max(1, -(-part.numel() // SAMPLE))] for part in map(_flat, weights)]
    # In one piece, and only then wider: hundreds of small conversions would each be a launch.
    return torch.cat(parts).double()


def _flat(weights: Tensor) -> Tensor:
    return weights.detach().flatten()
