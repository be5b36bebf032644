"""`FusedAdam` as NVIDIA's is to its caller, habits and all."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class FusedAdam(Optimizer):
    """Capturable and AdamW alone. What the real one does badly, this one does too, or refuses."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert capturable, "the other mode takes no verdict"
        assert adam_w_mode, "L2 regularisation is not decoupled weight decay"
        assert not amsgrad
        assert not master_weights
        defaults = {
            "lr": torch.tensor(lr),
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def step(
        self,
        closure: Any = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> None:
        assert (closure, grads, output_params, scale, grad_norms) == (None,) * 5, (
            "no longer supported"
        )
        for group in self.param_groups:
            device = group["params"][0].device
            # It goes by the flag that lies there, which is the last one it was told.
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int32)
            else:
                group["step"] = torch.ones(1, dtype=torch.int32, device=device)
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moving:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter.data).float(),
                        "exp_avg_sq": torch.zeros_like(parameter.data).float(),
                    }
            found_inf, inverse_scale = torch.zeros(1), torch.ones(1)
            if grad_scaler:
                found_inf = grad_scaler._check_inf_per_device(self)[device]
                inverse_scale = grad_scaler._get_scale_async().double().reciprocal().float()
            self._dummy_overflow_buf.copy_(found_inf)
            states = [self.state[parameter] for parameter in moving]
            lists = [
                (parameter.grad.data, parameter.data, state["exp_avg"], state["exp_avg_sq"])
                for parameter, state in zip(moving, states, strict=True)
            ]
            _kernel(self._dummy_overflow_buf, lists, group, inverse_scale)


def _kernel(
    flag: Tensor, lists: list[tuple[Tensor, ...]], group: dict[str, Any], inverse_scale: Tensor
) -> None:
    """What the capturable kernel computes, selected and not branched on, since a host must not
    ask."""
    lr, step = group["lr"], group["step"]
    assert (lr.dtype, lr.numel(), step.dtype, step.numel()) == (torch.float32, 1, torch.int32, 1), (
        "data_ptr<...>()"
    )
    assert inverse_scale.dtype == torch.float32
    beta1, beta2 = group["betas"]
    assert group["bias_correction"]
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for number, tensors in enumerate(lists):
        assert not any(isinstance(tensor, DTensor) for tensor in tensors), (
            "a DTensor has no memory of its own"
        )
        assert all(tensor.is_contiguous() for tensor in tensors), "A tensor was not contiguous."
        assert len({tensor.numel() for tensor in tensors}) == 1, "Size mismatch"
        assert {tensor.dtype for tensor in tensors} == {torch.float32}, "one type for all four"
        assert tensors[0].numel(), (
            f"an empty tensor, number {number}: behind it nothing would be launched"
        )
        gradient, weight, average, square = tensors
        scaled = gradient * inverse_scale
        new_average = beta1 * average + (1 - beta1) * scaled
        new_square = beta2 * square + (1 - beta2) * scaled * scaled
        denominator = (new_square / correction2).sqrt() + group["eps"]
        update = new_average / correction1 / denominator + group["weight_decay"] * weight
        new = (scaled, weight - lr * update, new_average, new_square)
        for old, value in zip(tensors, new, strict=True):
            old.copy_(torch.where(flag == 1, old, value))
