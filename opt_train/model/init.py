"""Initial weights that depend on the seed and on nothing else: not on layout, world size or order of construction."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from opt_train.model.config import ModelConfig

Progress = Callable[[int, int], None]
"""Told (done, all)."""

SCALED_DOWN = ("self_attn.out_proj.weight", "fc2.weight")
"""The matrices that write into the residual stream: their standard deviation is divided by sqrt(2 layers)."""


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int, progress: Progress | None = None) -> None:
    """Fill `model`'s parameters: N(0, init_std), biases 0, LayerNorms 1 (OPT; Megatron-LM, arXiv 1909.08053).

    Each matrix is drawn whole on the CPU from a generator of its own, and every rank keeps its slice. DTensor has no
    random numbers of its own on a CPU mesh: drawing shards in place would give each rank the same ones.
    """
    parameters = list(model.named_parameters())
    for done, (name, parameter) in enumerate(parameters):
        if progress is not None:
            progress(done, len(parameters))
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "layer_norm.weight" in name else 0.0)
            continue
        std = config.init_std
        if name.endswith(SCALED_DOWN):
            std /= math.sqrt(2 * config.layers)
        full = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=_generator(seed, name))
        _keep_own_slice(parameter, full)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _keep_own_slice(parameter: Tensor, full: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    # src_data_rank=None: every rank has the whole tensor already, so nothing is sent.
    own = distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(own.to_local())
