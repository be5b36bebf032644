"""AdamW (arXiv 1711.05101) that decides on the device whether a step counts."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opt_train.optim.apex import ApexAdamW, choose
from opt_train.optim.memory_efficient import MemoryEfficientAdamW


def make_optimizer(
    model: nn.Module, values: Mapping[str, float], fused: str = "torch"
) -> Optimizer:
    """AdamW over `model`'s parameters; ``optim.weight_decay`` on matrices, not on biases and
    LayerNorms.

    Which ones decay OPT's paper leaves open; these are Megatron-LM's two groups, embeddings among
    the first (`get_params_for_weight_decay_optimization` of the code that arXiv 2205.01068, section
    2.2, follows).

    torch's fused one or apex's, or `MemoryEfficientAdamW` where weights are in fp16. The moments
    exist from the start (zeros), so that a restore has tensors to fill; they are the same whoever
    updates them.

    Args:
        values: what is in force (`opt_train.optim.in_force`).
        fused: `OptimConfig.fused`.

    Raises:
        BadInput: `fused` asks for an apex that is not there.
    """
    # By rank of the tensor: biases and LayerNorms are vectors, everything else is a matrix.
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "decayed": True}, {"params": vectors, "decayed": False}]
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        narrow = MemoryEfficientAdamW(groups, lr=values["lr"])
        put_in_force(narrow, values)
        return narrow
    apex = choose(fused, parameters[0].device)
    optimizer: Optimizer
    if apex is None:
        optimizer = torch.optim.AdamW(groups, lr=values["lr"], fused=True)
    else:
        optimizer = ApexAdamW(groups, apex, lr=values["lr"])
    put_in_force(optimizer, values)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def put_in_force(optimizer: Optimizer, values: Mapping[str, float]) -> None:
    """Set LR, betas, eps and decay. Done before every step, so that nothing a checkpoint carried
    can outlive it."""
    for group in optimizer.param_groups:
        group["lr"] = values["lr"]
        group["betas"] = (values["beta1"], values["beta2"])
        group["eps"] = values["eps"]
        group["weight_decay"] = values["weight_decay"] if group["decayed"] else 0.0


def really_in_force(optimizer: Optimizer) -> dict[str, float]:
    """LR, betas, eps, decay and updates as the optimizer itself holds them. Waits for the device.

    NaN, which equals nothing, where groups or parameters that should agree do not, or where a
    vector decays.
    """
    groups = optimizer.param_groups
    updates = _only({int(state["step"].item()) for state in optimizer.state.values()})
    decays = {group["weight_decay"] for group in groups if group["decayed"]}
    others = {group["weight_decay"] for group in groups if not group["decayed"]}
    return {
        "lr": _only({group["lr"] for group in groups}),
        "beta1": _only({group["betas"][0] for group in groups}),
        "beta2": _only({group["betas"][1] for group in groups}),
        "eps": _only({group["eps"] for group in groups}),
        "weight_decay": _only(decays) if others <= {0.0} else math.nan,
        "updates": updates,
    }


def _only(values: set[float]) -> float:
    return next(iter(values)) if len(values) == 1 else math.nan


def apply(optimizer: Optimizer, skip: Tensor, factor: Tensor | None = None) -> None:
    """One update, unless `skip` (fp32 scalar on the device) is 1: then nothing changes, to the bit,
    NaN or not.

    The kernel reads the flag, so the host never waits. The bias correction's step count is undone
    with it.

    Args:
        factor: what gradients are to be multiplied by (`UpdateDecision.factor`), fp32 scalar on the
            device; None: 1. The kernel does that too, so no pass over the gradients is spent on it.
    """
    # The attributes that torch.amp.GradScaler sets. Multiplying the update by 0 would not do: 0 x
    # NaN is NaN.
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    if isinstance(optimizer, MemoryEfficientAdamW | ApexAdamW):
        optimizer.gradient_factor = factor
    else:
        reciprocal = None if factor is None else factor.reciprocal()
        optimizer.grad_scale = reciprocal  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
