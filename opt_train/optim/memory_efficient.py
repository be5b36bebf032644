"""AdamW for weights in fp16: moments in fp32, the update computed in fp32 and written back. How OPT
was trained.

torch's own AdamW keeps its moments in the weights' type, where 1e-8 is zero. Weights too large for
an update to reach their last bit stay as they are: that is the price of 12 bytes a parameter
instead of 16 (docs/precision.md).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class MemoryEfficientAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (arXiv 1711.05101), a parameter at a time, so fp32 copies exist of one
    parameter alone.

    After metaseq's `MemoryEfficientFP16Optimizer` (facebookresearch/metaseq,
    `metaseq/optim/fp16_optimizer.py`).
    """

    gradient_factor: Tensor | None = None
    """fp32 scalar on the device that gradients are multiplied by, in fp32; None: 1."""
    found_inf: Tensor | None = None
    """fp32 scalar on the device: where it is 1, `step` changes nothing, to the bit; None: 0."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(
            params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    **{
                        name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
                        for name in MOMENTS
                    },
                }

    @torch.no_grad()
    # Torch's overloads.
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Nothing waits for the device."""
        assert closure is None, "gradients are computed outside"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group)

    def _update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        weight, gradient = _local(parameter), _local(parameter.grad).float()
        average, square = (_local(state[name]) for name in MOMENTS)
        if self.gradient_factor is not None:
            gradient = gradient * self.gradient_factor
        step = state["step"] + 1
        new_average = torch.lerp(average, gradient, 1 - beta1)
        new_square = (square * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        new = weight.float() * (1 - lr * group["weight_decay"])
        # eps in fp32: fp16(1e-8) is 0, and the quotient of two small moments would be anything.
        denominator = (new_square.sqrt() / (1 - beta2**step).sqrt()).add_(group["eps"])
        new -= new_average / denominator * (lr / (1 - beta1**step))
        for old, updated in (
            (weight, new),
            (average, new_average),
            (square, new_square),
            (state["step"], step),
        ):
            # Selected and not multiplied by 0 or 1: 0 x NaN is NaN.
            kept = updated
            if self.found_inf is not None:
                kept = torch.where(self.found_inf != 0, old, updated.to(old.dtype))
            old.copy_(kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but for what it does to moments: casts them to the parameters' type."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            for name in MOMENTS:
                self.state[parameter][name] = state_dict["state"][number][name].to(
                    parameter.device, torch.float32
                )


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
