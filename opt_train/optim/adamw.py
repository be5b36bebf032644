"""AdamW (arXiv 1711.05101) that decides on the device whether a step counts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def make_optimizer(model: nn.Module, values: Mapping[str, float]) -> torch.optim.AdamW:
    """Fused AdamW over `model`'s parameters; weight decay on matrices, not on biases and LayerNorms.

    The moments exist from the start (zeros), so that a restore has tensors to fill.

    Args:
        values: what is in force (`opt_train.optim.in_force`).
    """
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "decayed": True}, {"params": vectors, "decayed": False}]
    optimizer = torch.optim.AdamW(groups, lr=values["lr"], fused=True)
    put_in_force(optimizer, values)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def put_in_force(optimizer: torch.optim.AdamW, values: Mapping[str, float]) -> None:
    """Set LR, betas, eps and decay. Done before every step, so that nothing a checkpoint carried can outlive it."""
    for group in optimizer.param_groups:
        group["lr"] = values["lr"]
        group["betas"] = (values["beta1"], values["beta2"])
        group["eps"] = values["eps"]
        group["weight_decay"] = values["weight_decay"] if group["decayed"] else 0.0


def really_in_force(optimizer: torch.optim.AdamW) -> dict[str, float]:
    """LR, betas, eps, decay and updates as the optimizer itself holds them. Waits for the device."""
    decayed = next(group for group in optimizer.param_groups if group["decayed"])
    updates = max(int(state["step"].item()) for state in optimizer.state.values())
    beta1, beta2 = decayed["betas"]
    return {
        "lr": decayed["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": decayed["eps"],
        "weight_decay": decayed["weight_decay"],
        "updates": updates,
    }


def apply(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """One update, unless `skip` (fp32 scalar on the device) is 1: then nothing changes, to the bit, NaN or not.

    The kernel reads the flag, so the host never waits. The bias correction's step count is undone with it.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]  # the attribute torch.amp.GradScaler sets
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
