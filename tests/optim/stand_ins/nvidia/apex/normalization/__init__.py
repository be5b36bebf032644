"""`FusedLayerNorm` as NVIDIA's is to its caller."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class FusedLayerNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape = torch.Size(shape)
        self.eps, self.elementwise_affine, self.memory_efficient = (
            eps,
            elementwise_affine,
            memory_efficient,
        )
        assert elementwise_affine
        self.weight = nn.Parameter(torch.empty(*shape))
        self.bias = nn.Parameter(torch.empty(*shape))
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        assert not isinstance(self.weight, DTensor), "the kernel takes no DTensor"
        assert input.dtype == self.weight.dtype == self.bias.dtype, "the kernel takes one type"
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
