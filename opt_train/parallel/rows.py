"""Tensors in the form that checkpoints have, for engines that shard in a way of their own: rows
over all ranks.

FSDP2 shards the same way, so a checkpoint of one engine is one of any other. One tensor at a time
exists whole.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def own_rows(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of `whole`, which every rank has, as a DTensor with memory of its own.
    Communicates nothing."""
    chunks = whole.detach().chunk(mesh.size())
    rank = mesh.get_local_rank()
    # `chunk` gives fewer pieces than ranks where there are few rows: the last ranks hold none, as
    # FSDP2 has it.
    own = chunks[rank].clone() if rank < len(chunks) else whole.new_empty((0, *whole.shape[1:]))
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def whole_of(rows: Tensor) -> Tensor:
    """The whole tensor on every rank, of what `own_rows` made. Called by all of them together."""
    whole: Tensor = rows.full_tensor() if isinstance(rows, DTensor) else rows
    assert isinstance(whole, torch.Tensor)
    return whole
