"""Which part of each tensor a rank holds, and where in the whole it lies."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class OwnPart(NamedTuple):
    """What this rank holds of a tensor, and where in the whole it begins."""

    local: Tensor
    offsets: tuple[int, ...]


def own_parts(tensors: Mapping[str, Tensor]) -> dict[str, OwnPart]:
    """The local part of each tensor, sharing its memory; those that have none here are left out."""
    parts = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                _, offsets = compute_local_shape_and_global_offset(
                    tensor.shape, tensor.device_mesh, tensor.placements
                )
                part = OwnPart(tensor.to_local(), tuple(offsets))
            else:
                part = OwnPart(tensor.detach(), (0,) * tensor.ndim)
            # A tensor with fewer rows than ranks leaves some ranks without a part of it.
            if part.local.numel() or not tensor.numel():
                parts[name] = part
    return parts
