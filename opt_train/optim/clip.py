"""The gradient's average and its global norm, clipped on the device without waiting for it."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class Clipped(NamedTuple):
    """Scalars on the device, the same on every rank."""

    norm: Tensor
    """Global L2 norm of the averaged gradient before clipping, without the loss scale, fp64."""
    clipped_norm: Tensor
    """The same after clipping, fp64."""
    skip: Tensor
    """fp32: 1 where the norm is not finite, so that no rank may apply it."""
    factor: Tensor
    """fp32: what gradients narrower than fp32, which would lose it, are still to be multiplied by."""


def predivision(enabled: bool, data_world: int) -> float:
    """What gradients are multiplied by before they are summed over `data_world` ranks.

    OPT divided by N in two steps, by the square root of N before the sum and again behind it, so that neither what is
    summed underflows nor the sum overflows in fp16 (arXiv 2205.01068, section 2.2). The second half is part of
    `average_and_clip`'s one multiplication.
    """
    return 1.0 / math.sqrt(data_world) if enabled else 1.0


@torch.no_grad()
def average_and_clip(
    parameters: Iterable[Tensor], tokens: Tensor, max_norm: float, grad_scale: Tensor | None = None
) -> Clipped:
    """Divide the summed gradients by the world's tokens and by `grad_scale`, and clip their global norm.

    Clipping is that of Pascanu et al. 2013 (arXiv 1211.5063). One small reduction over the world carries all: every
    rank gets the same norm, so all clip, or skip, alike. Gradients that are skipped hold no meaning afterwards.

    Args:
        parameters: their `.grad` holds sums over ranks, as `opt_train.parallel.fsdp.build` arranges it.
        tokens: weight of this rank's tokens, fp64 scalar on the device. Ranks that read the same ones share it out.
        max_norm: largest norm of the averaged gradient.
        grad_scale: fp32 scalar that the gradients came multiplied by; None: 1.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [_local(gradient) for gradient in gradients]
    # In fp32 whatever the gradients are in: an fp16 norm overflows where no element does.
    norms = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32)).double()
    copies = [_copies(gradient) for gradient in gradients]
    if len(set(copies)) == 1:  # divided once, as a sum: most layouts have no others
        squares = norms.square().sum() / copies[0]
    else:
        squares = (norms.square() / torch.tensor(copies, dtype=torch.float64).to(norms.device, non_blocking=True)).sum()
    sums = torch.stack([squares, tokens.double()])
    dist.all_reduce(sums)
    divisor = sums[1] if grad_scale is None else sums[1] * grad_scale.double()
    norm = sums[0].sqrt() / divisor
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = (coefficient / divisor).float()
    if wide := [gradient for gradient in local if gradient.dtype == torch.float32]:
        torch._foreach_mul_(wide, factor)
    return Clipped(norm, norm * coefficient, (~norm.isfinite()).float(), factor)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(gradient: Tensor) -> int:
    """How many ranks of the world hold each element of this rank's part of `gradient`."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size()
    mesh, placements = gradient.device_mesh, gradient.placements
    assert not any(isinstance(placement, Partial) for placement in placements), "a gradient that is still to be summed"
    inside = math.prod(mesh.size(d) for d, placement in enumerate(placements) if isinstance(placement, Replicate))
    # The parameter may live on a part of the world, and on each other part of that size just so.
    return inside * dist.get_world_size() // mesh.size()
