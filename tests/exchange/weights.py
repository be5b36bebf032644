"""Checkpoints of models that nobody trained, saved as a run saves them; `python weights.py FOLDER
RANK WORLD` saves one from several ranks."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.save import save
from opt_train.checkpoint.tensors import tensors_of
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from tests.train.leave import leave_with

SHARDED = ModelConfig(
    name="sharded",
    layers=2,
    heads=4,
    d_model=64,
    ffn=160,
    layer_norm="post",
    embed_dim=36,
    vocab_size=301,
    positions=30,
    dropout=0.0,
)
"""Rows that no number of ranks divides."""

COLUMNS = "model.model.decoder.layers.0.fc2.weight"
"""Is cut into columns, as tensor parallelism cuts it."""


def drawn(config: ModelConfig) -> OPT:
    model = OPT(config)
    initialise(model, replace(config, init_std=0.1), seed=3)
    return model


def checkpoint_of(model: OPT, folder: Path) -> Path:
    """A committed checkpoint with optimizer state, as one rank saves it."""
    optimizer = torch.optim.AdamW(model.parameters())
    files = save(tensors_of(model, optimizer), {"step": 7}, folder)
    commit_manifest(
        folder,
        build_manifest(folder, "1.00", 7, {file.path: (file.bytes, file.sha256) for file in files}),
    )
    return folder


def main(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=world
    )
    model = drawn(SHARDED)
    for layer in model.model.decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    tensors = tensors_of(model, None)
    split = drawn(SHARDED).model.decoder.layers[0].fc2.weight.detach()
    mesh = init_device_mesh("cpu", (world,))
    tensors[COLUMNS] = distribute_tensor(split, mesh, [Shard(1)])
    reports: list[object] = [None] * world
    dist.all_gather_object(reports, save(tensors, {"step": 7}, folder))
    if rank == 0:
        written: list[Any] = [file for report in reports for file in report]
        named = {file.path: (file.bytes, file.sha256) for file in written}
        commit_manifest(folder, build_manifest(folder, "1.00", 7, named))
    leave_with(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
