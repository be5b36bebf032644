"""State of an engine for the rank scripts of `test_fairscale.py` and `test_deepspeed.py`: hashed,
saved together."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.save import save
from opt_train.parallel.engine import Engine


def save_together(engine: Engine, folder: Path) -> None:
    """Every rank's part of a checkpoint, and then its manifest."""
    files = save(engine.tensors(), {}, folder)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, files)
    if dist.get_rank() == 0:
        named = {file.path: (file.bytes, file.sha256) for report in reports for file in report}
        commit_manifest(folder, build_manifest(folder, "1.00", 0, named))
    dist.barrier()


def described(tensor: Tensor) -> tuple[list[int], str, str]:
    """Shape, type and hash of the whole tensor."""
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    return (
        list(whole.shape),
        str(whole.dtype),
        hashlib.sha256(whole.view(-1).numpy().tobytes()).hexdigest(),
    )


def world_sum(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
