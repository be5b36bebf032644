"""Initial weights that depend on the seed and on nothing else: not on layout, world size or order
of construction."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opt_train.model.config import ModelConfig

Progress = Callable[[int, int], None]
"""Told (done, all)."""

ROWS = 256
"""Rows that one generator draws."""

SCALED_DOWN = ("self_attn.out_proj.weight", "fc2.weight")
"""The matrices that write into the residual stream: their standard deviation is divided by sqrt(2
layers)."""


@torch.no_grad()
def initialise(
    model: nn.Module, config: ModelConfig, seed: int, progress: Progress | None = None
) -> None:
    """Fill `model`'s parameters: N(0, ``model.init_std``), biases 0, LayerNorms 1 (arXiv
    2205.01068, section 2.2).

    A matrix is drawn on the CPU in blocks of rows, each from a generator of its own, and a rank
    draws the blocks that it holds rows of. DTensor has no random numbers of its own on a CPU mesh:
    drawing shards in place would give each rank the same ones.
    """
    # The trap: meta device, `to_empty` and `nn.init` on DTensors give every shard the *same*
    # numbers, and a loss that depends on the world size, without an error.
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
        _draw(parameter, std, f"{seed}:{name}")


def _draw(parameter: Tensor, std: float, key: str) -> None:
    """Normal numbers into this rank's part of a matrix [rows, columns]."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    own_rows, own_columns = _own_part(parameter, 0), _own_part(parameter, 1)
    assert local.shape == (len(own_rows), len(own_columns)), (local.shape, own_rows, own_columns)
    first, end = own_rows.start, own_rows.stop
    columns = slice(own_columns.start, own_columns.stop)
    for start in range(first - first % ROWS, end, ROWS):
        rows = min(ROWS, parameter.shape[0] - start)
        # The whole block, though a part may do: the numbers depend on where the generator stands.
        block = torch.empty(rows, parameter.shape[1]).normal_(
            0.0, std, generator=_generator(f"{key}:{start}")
        )
        begin, stop = max(first, start), min(end, start + rows)
        local[begin - first : stop - first].copy_(block[begin - start : stop - start, columns])


def _own_part(parameter: Tensor, dim: int) -> range:
    """Which of the rows (`dim` 0) or columns (1) of the whole matrix this rank holds.

    The last dimension of the mesh splits first: tensor parallelism came before FSDP.
    """
    part = range(parameter.shape[dim])
    if isinstance(parameter, DTensor):
        for number, placement in reversed(list(enumerate(parameter.placements))):
            # FSDP over tensor parallelism has a placement of its own kind, which also tells its
            # `dim`.
            if getattr(placement, "dim", None) == dim:
                mesh = parameter.device_mesh
                chunk = -(-len(part) // mesh.size(number))
                part = part[mesh.get_local_rank(number) * chunk :][:chunk]
    return part


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
