"""The gradient's average and its global norm, clipped on the device without waiting for it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class GradNorm(NamedTuple):
    """Scalars on the device, the same on every rank."""

    norm: Tensor
    """Global L2 norm of the averaged gradient, without the loss scale, fp64."""
    divisor: Tensor
    """What makes averages of the summed gradients: the world's tokens times the gradients' scale,
    fp64."""
    loss: Tensor
    """Mean over the world's tokens in nats, fp64; 0 where no losses were given."""
    embedding_squares: Tensor | None = None
    """This rank's share of the squared L2 norm of the embedding's part of the averaged gradient,
    fp64, which the world's sum completes; None where nobody said which part that is."""


class UpdateDecision(NamedTuple):
    """What is to become of a step's gradients. Scalars on the device, the same on every rank."""

    norm: Tensor
    """Global L2 norm of the averaged gradient before clipping, without the loss scale, fp64."""
    clipped_norm: Tensor
    """The same after clipping, fp64."""
    skip: Tensor
    """fp32: 1 where no rank may apply it: norm or loss is not finite, or the step was refused."""
    overflow: Tensor
    """fp32: 1 where the norm is not finite."""
    factor: Tensor
    """fp32: what the update multiplies the summed gradients by: average, clipping and loss scale in
    one."""


def predivision(enabled: bool, data_world: int) -> float:
    """What gradients are multiplied by before they are summed over `data_world` ranks.

    OPT divided by N in two steps, by the square root of N before the sum and again behind it, so
    that neither what is summed underflows nor the sum overflows in fp16 (arXiv 2205.01068, section
    2.2). The second half is part of `UpdateDecision.factor`. `enabled` is ``precision.predivide``,
    for fp16 alone.
    """
    return 1.0 / math.sqrt(data_world) if enabled else 1.0


@torch.no_grad()
def global_norm(
    parts: Sequence[Tensor],
    copies: Sequence[int],
    tokens: Tensor,
    grad_scale: Tensor | None = None,
    loss_sum: Tensor | None = None,
    embedding: Sequence[int] = (),
) -> GradNorm:
    """The norm of the gradient that all ranks hold together, divided by the world's tokens and by
    `grad_scale`.

    One small reduction over the world carries all: every rank gets the same norm, so all clip, or
    skip, alike.

    Args:
        parts: this rank's parts of gradients, sums over ranks.
        copies: how many ranks hold each of them (`copies_of`).
        tokens: weight of this rank's tokens, fp64 scalar on the device. Ranks that read the same
            ones share it out.
        grad_scale: fp32 scalar that the gradients came multiplied by; None: 1.
        loss_sum: of this rank's tokens in nats, shared out likewise.
        embedding: which of `parts` are the embedding's.
    """
    # In fp32 whatever the gradients are in: an fp16 norm overflows where no element does.
    norms = torch.stack(torch._foreach_norm(list(parts), 2, dtype=torch.float32)).double()
    if len(set(copies)) == 1:  # divided once, as a sum: most layouts have no others
        squares = norms.square().sum() / copies[0]
    else:
        squares = (
            norms.square()
            / torch.tensor(copies, dtype=torch.float64).to(norms.device, non_blocking=True)
        ).sum()
    losses = torch.zeros_like(squares) if loss_sum is None else loss_sum.double()
    sums = torch.stack([squares, tokens.double(), losses])
    # Over the whole world, whatever the meshes. torch's `clip_grad_norm_` wants all parameters on
    # one mesh; `torch.amp.GradScaler` reduces its overflow flag with the first gradient's
    # placements only, so under tensor parallelism some ranks step, some skip, and the copies
    # diverge without an error.
    dist.all_reduce(sums)
    divisor = sums[1] if grad_scale is None else sums[1] * grad_scale.double()
    own = None
    if embedding:
        # Of norms that are there already: no other pass over the gradients.
        shares = torch.stack([norms[part].square() / copies[part] for part in embedding])
        own = shares.sum() / divisor.square()
    return GradNorm(sums[0].sqrt() / divisor, divisor, sums[2] / sums[1], own)


@torch.no_grad()
def clip(grad_norm: GradNorm, max_norm: float, refused: Tensor | None = None) -> UpdateDecision:
    """Clip the global norm to `max_norm` (Pascanu et al. 2013, arXiv 1211.5063), or skip what is
    not finite, or refused (`OutlierGuard.refuses`).

    OPT's ``optim.clip`` is 1.0, and was 0.3 late in the 175B run (arXiv 2205.01068, section 2.2).
    """
    norm = grad_norm.norm
    # torch's own 1e-6, so that a reference clips alike. NaN passes `clamp` and is skipped below.
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    overflow = ~norm.isfinite()
    skip = overflow | ~grad_norm.loss.isfinite()
    return UpdateDecision(
        norm,
        norm * coefficient,
        (skip if refused is None else skip | refused).float(),
        overflow.float(),
        (coefficient / grad_norm.divisor).float(),
    )


@torch.no_grad()
def multiply(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply `gradients` in place; nothing waits for the device."""
    if gradients:
        torch._foreach_mul_(list(gradients), factor)


def local_part(gradient: Tensor) -> Tensor:
    """What this rank holds of `gradient`."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def copies_of(gradient: Tensor) -> int:
    """How many ranks of the world hold each element of this rank's part of `gradient`."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size()
    mesh, placements = gradient.device_mesh, gradient.placements
    assert not any(isinstance(placement, Partial) for placement in placements), (
        "a gradient that is still to be summed"
    )
    inside = math.prod(
        mesh.size(d) for d, placement in enumerate(placements) if isinstance(placement, Replicate)
    )
    # The parameter may live on a part of the world, and on each other part of that size just so.
    return inside * dist.get_world_size() // mesh.size()
