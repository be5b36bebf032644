"""The gradient's average and its global norm, clipped on the device without waiting for it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Clipped(NamedTuple):
    """Scalars on the device, the same on every rank."""

    norm: Tensor
    """Global L2 norm of the averaged gradient before clipping, fp64."""
    clipped_norm: Tensor
    """The same after clipping, fp64."""
    skip: Tensor
    """fp32: 1 where the norm is not finite, so that no rank may apply it."""


@torch.no_grad()
def average_and_clip(
    parameters: Iterable[Tensor], tokens: Tensor, max_norm: float, group: dist.ProcessGroup | None, replicate: int
) -> Clipped:
    """Divide the summed gradients by the world's tokens and clip their global norm (Pascanu et al. 2013).

    One small reduction carries both: every rank gets the same norm, so all clip, or skip, alike. Gradients that are
    skipped hold no meaning afterwards.

    Args:
        parameters: their `.grad` holds sums over ranks, as `opt_train.parallel.fsdp.build` arranges it.
        tokens: weight of this rank's tokens, fp64 scalar on the device.
        max_norm: largest norm of the averaged gradient.
        group: the ranks that read different samples; None for the whole world.
        replicate: ranks that hold the same gradient shard (HSDP).
    """
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients)).double()
    sums = torch.stack([norms.square().sum() / replicate, tokens.double()])
    dist.all_reduce(sums, group=group)
    norm = sums[0].sqrt() / sums[1]
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, (coefficient / sums[1]).to(gradients[0].dtype))
    return Clipped(norm, norm * coefficient, (~norm.isfinite()).float())


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
