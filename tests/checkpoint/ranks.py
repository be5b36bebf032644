"""Real ranks for the checkpoint tests: `python ranks.py SCENARIO RANK WORLD FOLDER`, meeting in
`FOLDER/rendezvous-*`.

A scenario is a function of this file; what it asserts, the rank asserts. `Ranks` of
`test_ranks.py` starts them.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.manifest import CheckpointError, read
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.save import save
from opt_train.checkpoint.tensors import ModelAndOptimizer, reshard, tensors_of
from opt_train.protocol.facts import SavedFile
from tests.checkpoint.torchs_reader import read_by_torch

WIDTH = 5
"""Odd, and smaller than what some parameters are cut into: shards of unequal size, and empty
ones."""


class Small(nn.Module):
    """Tied embedding and head, biases, a parameter with a single row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.single = nn.Linear(WIDTH, 1)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.head(self.norm(hidden + self.single(hidden)))


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Small()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int
) -> list[float]:
    """Train on batches that the step alone decides, the same on every rank; the losses."""
    losses = []
    for step in range(first, first + steps):
        tokens = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the state, gathered and copied."""
    return gathered(tensors_of(model, optimizer))


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def commit_together(folder: Path, step: int, files: tuple[SavedFile, ...]) -> None:
    """What the supervisor does with the ranks' reports."""
    reports: list[tuple[SavedFile, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, files)
    if dist.get_rank() == 0:
        named = {
            file.path: (file.bytes, file.sha256) for report in reports for file in report or ()
        }
        commit_manifest(folder, build_manifest(folder, "1.00", step, named))
    dist.barrier()


def save_and_resume(root: Path) -> None:
    """Save in the middle, go on; a second model restored from the checkpoint takes the same steps,
    to the bit."""
    model, optimizer = sharded(seed=0)
    train(model, optimizer, 0, 3)
    moved = []
    files = save(
        tensors_of(model, optimizer),
        {"step": 3, "nothing": float("nan")},
        root / "step-00000003",
        progress=lambda done, total: moved.append((done, total)),
    )
    assert moved
    assert moved[-1][0] <= moved[-1][1]
    commit_together(root / "step-00000003", 3, files)
    at_save = whole(model, optimizer)
    losses = train(model, optimizer, 3, 3)
    if dist.get_rank() == 0:
        save_file(at_save, root / "reference.safetensors")

    again, its_optimizer = sharded(seed=1)
    restore(
        ModelAndOptimizer(again, its_optimizer),
        root / "step-00000003",
        read(root / "step-00000003"),
    )
    same(whole(again, its_optimizer), at_save)
    assert train(again, its_optimizer, 3, 3) == losses
    same(whole(again, its_optimizer), whole(model, optimizer))


def resume_elsewhere(root: Path) -> None:
    """What `save_and_resume` saved, on another number of ranks; torch's reader finds the same."""
    folder, reference = root / "step-00000003", load_file(root / "reference.safetensors")
    model, optimizer = sharded(seed=2)
    restore(ModelAndOptimizer(model, optimizer), folder, read(folder))
    same(whole(model, optimizer), reference)
    theirs = tensors_of(*sharded(seed=3))
    read_by_torch(theirs, folder)
    same(gathered(theirs), reference)


def after_evaluation(root: Path) -> None:
    """A forward pass without gradients leaves FSDP's root unsharded: save and restore must not fall
    for it."""
    model, optimizer = sharded(seed=0)
    train(model, optimizer, 0, 2)
    at_save = whole(model, optimizer)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        model(tokens)
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    reshard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad():
        model(tokens)
    folder = root / "evaluated"
    commit_together(folder, 2, save(tensors_of(model, optimizer), {}, folder))
    train(model, optimizer, 2, 2)
    with torch.no_grad():
        model(tokens)
    restore(ModelAndOptimizer(model, optimizer), folder, read(folder))
    same(whole(model, optimizer), at_save)
    reference, its_optimizer = sharded(seed=0)
    assert train(reference, its_optimizer, 0, 4)[2:] == train(model, optimizer, 2, 2)


def before_the_first_step(root: Path) -> None:
    """A checkpoint of an optimizer that has not stepped is that of one that has not stepped."""
    model, optimizer = sharded(seed=0)
    before = [
        p.to_local().clone() if isinstance(p, DTensor) else p.clone() for p in model.parameters()
    ]
    folder = root / "fresh"
    commit_together(folder, 0, save(tensors_of(model, optimizer), {}, folder))
    after = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    again, its_optimizer = sharded(seed=1)
    restore(ModelAndOptimizer(again, its_optimizer), folder, read(folder))
    reference, reference_optimizer = sharded(seed=0)
    losses = train(reference, reference_optimizer, 0, 3)
    assert train(again, its_optimizer, 0, 3) == losses
    assert train(model, optimizer, 0, 3) == losses


def fails_on_one_rank(root: Path) -> None:
    """Rank 1's disk fails in the middle of its file: both ranks raise, nothing is left, and the
    next save works."""
    model, optimizer = sharded(seed=0)
    tensors = tensors_of(model, optimizer)

    def fail(done: int, total: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    folder = root / "failed"
    with pytest.raises(CheckpointError, match=r"rank 1: \[Errno 5\] Input/output error"):
        save(tensors, {}, folder, progress=fail if dist.get_rank() == 1 else None)
    dist.barrier()
    assert not folder.exists()
    # or the next save of a faster rank makes the folder before a slower one has looked
    dist.barrier()
    commit_together(folder, 0, save(tensors, {}, folder))
    assert (folder / "manifest.json").exists()


def flipped_byte(root: Path) -> None:
    """Only the rank that checks the file sees the flip; every rank refuses."""
    model, optimizer = sharded(seed=0)
    folder = root / "flipped"
    commit_together(folder, 0, save(tensors_of(model, optimizer), {}, folder))
    if dist.get_rank() == 0:
        shard = sorted(folder.glob("*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"wrong checksum|1 other rank failed"):
        restore(ModelAndOptimizer(model, optimizer), folder, read(folder))


def killed_in_the_middle(root: Path) -> None:
    """Commits a checkpoint, then begins another and never ends: the test kills the ranks in it."""
    model, optimizer = sharded(seed=0)
    train(model, optimizer, 0, 2)
    good = root / "step-00000002"
    commit_together(good, 2, save(tensors_of(model, optimizer), {"step": 2}, good))
    at_save = whole(model, optimizer)
    if dist.get_rank() == 0:
        save_file(at_save, root / "reference.safetensors")
    train(model, optimizer, 2, 1)

    def linger(done: int, total: int) -> None:
        (root / f"writing-{dist.get_rank()}").touch()
        time.sleep(60)

    save(tensors_of(model, optimizer), {"step": 3}, root / "step-00000003", progress=linger)


def restore_before(root: Path) -> None:
    """After `killed_in_the_middle`: the checkpoint before the one that was being written is
    whole."""
    model, optimizer = sharded(seed=1)
    restore(
        ModelAndOptimizer(model, optimizer), root / "step-00000002", read(root / "step-00000002")
    )
    same(whole(model, optimizer), load_file(root / "reference.safetensors"))


def full_disk(root: Path) -> None:
    """Shards of 2 MB on a disk of 1 MB."""
    folder = root / "disk" / "1.00" / "step-00000001"
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        save(
            {"model.large": torch.ones(1 << 19), f"model.{dist.get_rank()}": torch.ones(1 << 19)},
            {},
            folder,
        )


SCENARIOS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        save_and_resume,
        resume_elsewhere,
        after_evaluation,
        before_the_first_step,
        fails_on_one_rank,
        flipped_byte,
        killed_in_the_middle,
        restore_before,
        full_disk,
    )
}


def main(names: str, rank: int, world: int, root: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / f"rendezvous-{names[:40]}-{world}"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for name in names.split(","):
        SCENARIOS[name](root)
    # Leave together, by the store: a rank that closes its connections first can reset one that is
    # still in a barrier.
    store.add("done", 1)
    deadline = time.monotonic() + 20  # one that failed never comes
    while store.add("done", 0) < world and time.monotonic() < deadline:
        time.sleep(0.01)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    # As a real rank does: gloo's threads may outlive its group, and an exit handler that ends them
    # aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
