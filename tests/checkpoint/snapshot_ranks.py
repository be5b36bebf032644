"""One rank of `test_snapshot.py`: `snapshot_ranks.py RANK WORLD STORE CASES FOLDER`; prints what it
found, by case.

A case is the JSON list `[name, [replicate, shard, tensor], changes of ParallelConfig, precision,
trouble]`. The ranks train on it, take a snapshot while the next step computes, and restore each
from its own file alone. Then they read all files on another layout. With `trouble` "read" they do
nothing but read what others have left in FOLDER.
"""

import json
import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.manifest import CheckpointError, own_file_name, read
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshot, Snapshots
from opt_train.optim.clip import clip
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import Engine, EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.parallel.measure import loss_over
from tests.checkpoint.torchs_reader import read_by_torch
from tests.parallel import deepspeed_on_cpu, fairscale_on_cpu
from tests.parallel.layout_ranks import CPU, MODEL, SEQUENCE, VALUES, share
from tests.train.leave import leave_with

PRECISIONS = {
    "fp32": PrecisionConfig(compute="fp32"),
    "memory-efficient fp16": PrecisionConfig(compute="fp16", weights="fp16"),
}


class Case:
    def __init__(self, degrees: list[int], ways: dict[str, Any], precision: str) -> None:
        self.layout, self.parallel, self.precision = (
            Layout(*degrees),
            ParallelConfig(**ways),
            PRECISIONS[precision],
        )

    def engine(self, seed: int) -> Engine:
        return make_engine(
            EngineSpec(
                model=MODEL,
                precision=self.precision,
                parallel=self.parallel,
                layout=self.layout,
                device=CPU,
                values=VALUES,
                seed=seed,
            )
        )

    def step(self, engine: Engine, number: int, snapshot: Snapshot | None = None) -> float:
        """Two micro-batches and an update; this rank's loss before it."""
        batches = share(number, self.layout.data_rank(dist.get_rank()), self.layout.data_world)
        sums = engine.forward_backward(batches)
        tokens = (
            float(sum(batch.weights.sum() for batch in batches)) * SEQUENCE / self.layout.tensor
        )
        decision = clip(engine.grad_norm(torch.tensor(tokens, dtype=torch.float64)), VALUES["clip"])
        if snapshot is not None:
            snapshot.wait_copied()
        engine.apply(decision)
        return float(sums.loss_sum)

    def evaluate(self, engine: Engine) -> None:
        engine.model.eval()
        loss_over(engine.model, share(99, 0, 8)[:1], CPU, lambda done: None)
        engine.model.train()

    def fail_in_forward(self, engine: Engine) -> None:
        """A forward pass that ends in its last layer, as where memory runs out."""

        def fail(*_: object) -> None:
            raise MemoryError("planted")

        last: Any = engine.model.model.decoder.layers[-1]  # type: ignore[union-attr,index]
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            engine.forward_backward(share(98, 0, 8))
        hook.remove()


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of the state, gathered and copied."""
    return gathered(engine.tensors())


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .clone()
        .contiguous()
        for name, tensor in tensors.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def hold(snapshot: Snapshot, folder: Path) -> None:
    """What agents and supervisor do: all files of all ranks, and a manifest beside them."""
    folder.mkdir(exist_ok=True)
    files = snapshot.files()
    for file in files:
        (folder / file.path).write_bytes(os.pread(file.fd, 1 << 30, 0))
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, files)
    if dist.get_rank() == 0:
        named = {file.path: (file.bytes, file.sha256) for report in reports for file in report}
        commit_manifest(folder, build_manifest(folder, "1.00", 2, named))
    dist.barrier()


def take_and_restore(case: Case, folder: Path, trouble: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = case.engine(seed=3)
    for number in range(2):
        case.step(engine, number)
    at_snapshot = whole(engine)
    if trouble == "evaluation":
        case.evaluate(engine)
    if trouble == "raised":
        case.fail_in_forward(engine)
    if trouble:
        assert not all(isinstance(parameter, DTensor) for parameter in engine.model.parameters())
    state = {"step": 2, PARTS: OWN, "world_size": world} if rank == 0 else None
    snapshot = Snapshots(rank, 1, CPU).begin(2, engine.tensors(), state)
    loss = float("nan")
    if trouble == "raised":  # such an engine goes no further
        snapshot.wait_copied()
    else:
        loss = case.step(engine, 2, snapshot)
    hold(snapshot, folder)

    # The others' files are on other nodes.
    node = folder.with_name(f"{folder.name}-node{rank}")
    node.mkdir()
    own = node / own_file_name(rank)
    shutil.copyfile(folder / own.name, own)
    manifest = read(folder)
    # ZeRO is there once a process.
    again = engine if case.parallel.engine == "deepspeed" else case.engine(seed=4)
    restore(again, node, manifest, rank_file=own)
    same(whole(again), at_snapshot)
    if trouble != "raised":
        after = whole(engine) if again is not engine else {}
        assert case.step(again, 2) == loss
        if after:
            same(whole(again), after)
    if rank == 0:
        save_file(at_snapshot, folder.with_name(f"{folder.name}.reference"))
    dist.barrier()
    read_elsewhere(case, folder)
    spoil_one(case, again, manifest, own)
    return {
        "own": own.stat().st_size,
        "tensors": sum(t.numel() * t.element_size() for t in at_snapshot.values()),
    }


def read_elsewhere(case: Case, folder: Path) -> None:
    """All files together on as many ranks as there are, sharded by torch alone; torch's reader
    finds the same."""
    parallel, layout = ParallelConfig(), Layout(1, dist.get_world_size(), 1)
    reference = load_file(folder.with_name(f"{folder.name}.reference"))
    other = make_engine(
        EngineSpec(
            model=MODEL,
            precision=case.precision,
            parallel=parallel,
            layout=layout,
            device=CPU,
            values=VALUES,
            seed=5,
        )
    )
    restore(other, folder, read(folder))
    same(whole(other), reference)
    theirs = make_engine(
        EngineSpec(
            model=MODEL,
            precision=case.precision,
            parallel=parallel,
            layout=layout,
            device=CPU,
            values=VALUES,
            seed=6,
        )
    ).tensors()
    read_by_torch(theirs, folder)
    same(gathered(theirs), reference)


def spoil_one(case: Case, engine: Engine, manifest: Any, own: Path) -> None:
    """A flipped byte on one rank: all refuse together."""
    if dist.get_rank() == dist.get_world_size() - 1:
        content = bytearray(own.read_bytes())
        content[-1] ^= 1
        own.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"wrong checksum|1 other rank failed"):
        restore(engine, own.parent, manifest, rank_file=own)


def main() -> None:
    rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[5])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cases = json.loads(sys.argv[4])
    engines = {case[2].get("engine") for case in cases}
    if "fairscale" in engines:
        fairscale_on_cpu.apply()
    if "deepspeed" in engines:
        deepspeed_on_cpu.apply()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for name, degrees, ways, precision, trouble in cases:
        case = Case(degrees, ways, precision)
        if trouble == "read":
            found[name] = read_elsewhere(case, folder / name)
        else:
            found[name] = take_and_restore(case, folder / name, trouble)
    leave_with(found)


if __name__ == "__main__":
    main()
