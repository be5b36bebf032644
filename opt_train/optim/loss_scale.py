"""The loss scale of fp16 training, kept and moved on the device: the host never waits to know it.

Gradients below 2^-24 are zero in fp16; multiplied by the scale they are not (Micikevicius et al.
2018, arXiv 1710.03740). When it moves is a `LossScalePolicy`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from opt_train.optim.loss_scale_policy import CEILING, LossScalePolicy

LONGEST_WINDOW = 2**40


class LossScale:
    """The scale and its counters as scalars on the device. Every rank that feeds it the same
    decisions has the same."""

    def __init__(self, policy: LossScalePolicy, device: torch.device) -> None:
        self.policy = policy
        self.floor = policy.floor
        """The scale falls no further."""
        self._fixed = policy.initial
        """Where the scale never moves by itself: what it is."""
        self.scale = torch.tensor(policy.initial, dtype=torch.float32).to(device)
        """What the next step's gradients are multiplied by, fp32. A new tensor after each
        update."""
        self._window = _counter(policy.window_steps, device)
        self._steps = _counter(0, device)
        """Without overflow, since the last one."""
        self._patience = _counter(policy.hysteresis, device)
        """Overflows until the scale halves."""

    @torch.no_grad()
    def put_in_force(self, values: Mapping[str, float]) -> None:
        """Take over what is in force for the step that is about to be taken: the floor, and the
        scale where it is fixed or an order sets it at this very step. Called before every step, and
        again for the same one it changes nothing. Nothing waits for the device.

        Args:
            values: as `in_force` has them.
        """
        floor = values.get("loss_scale_floor", self.policy.floor)
        if floor != self.floor:
            self.floor = floor
            self.scale = self.scale.clamp(min=floor)
        scale = values.get("loss_scale")
        if scale is None or (not self.policy.window_steps and scale == self._fixed):
            return
        self._fixed = scale
        self.scale = torch.full_like(self.scale, max(scale, floor))
        # What was counted was counted of another scale.
        window = values.get("loss_scale_window_steps", self.policy.window_steps)
        self._window = torch.full_like(self._window, int(window))
        self._steps = torch.zeros_like(self._steps)
        self._patience = torch.full_like(self._patience, self.policy.hysteresis)

    @property
    def window_steps(self) -> int:
        """Steps without overflow after which the scale doubles; 0: never. Waits for the device."""
        return int(self._window.item())

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Move on by one step. Nothing waits for the device.

        Args:
            skip: 1 where the step overflowed, the same on every rank (`UpdateDecision.skip`).
        """
        policy = self.policy
        if not policy.window_steps:
            return
        # Selected by `torch.where`, so that no branch waits for the device to know `skip`.
        overflow = skip != 0
        self._steps = torch.where(overflow, 0, self._steps + 1)
        grows = ~overflow & (self._steps % self._window == 0)
        patience = torch.where(overflow, (self._patience - 1).clamp(min=0), self._patience)
        shrinks = overflow & (patience == 0)
        self._patience = torch.where(grows, policy.hysteresis, patience)
        # Powers of two: multiplying gradients by the scale and dividing it out loses no bit.
        doubled = (self.scale * 2).clamp(max=CEILING)
        halved = (self.scale / 2).clamp(min=self.floor)
        self.scale = torch.where(grows, doubled, torch.where(shrinks, halved, self.scale))
        if policy.window_adapts:
            longer, shorter = (
                (self._window * 2).clamp(max=LONGEST_WINDOW),
                (self._window // 2).clamp(min=1),
            )
            self._window = torch.where(grows, longer, torch.where(shrinks, shorter, self._window))

    def to_json(self) -> dict[str, Any]:
        """The state and the policy it belongs to, for a checkpoint. Waits for the device."""
        return {
            "policy": asdict(self.policy),
            "scale": self.scale.item(),
            "window_steps": int(self._window.item()),
            "steps": int(self._steps.item()),
            "patience": int(self._patience.item()),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `to_json` saved. Under another policy than then, start as the policy
        does: it was asked for.

        Raises:
            KeyError, TypeError, ValueError: `saved` is not what `to_json` makes.
        """
        scale, window, steps, patience = (
            saved[key] for key in ("scale", "window_steps", "steps", "patience")
        )
        # metaseq silently keeps the checkpoint's settings instead, which spoiled OPT-175B's runs
        # 12.35 to 12.37: what is configured must hold.
        if saved["policy"] != asdict(self.policy):
            return
        self.scale = torch.full_like(self.scale, float(scale))
        self._fixed = float(scale)
        self._window = torch.full_like(self._window, int(window))
        self._steps = torch.full_like(self._steps, int(steps))
        self._patience = torch.full_like(self._patience, int(patience))


def expected_scale(policy: LossScalePolicy, saved: Mapping[str, Any] | None) -> float:
    """The scale that a start from `saved` must have in effect; None: a start from scratch.

    Raises:
        KeyError, TypeError, ValueError: `saved` is not what `LossScale.to_json` makes.
    """
    if saved is None or saved["policy"] != asdict(policy):
        return policy.initial
    return float(saved["scale"])


def _counter(value: int, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.int64).to(device)
