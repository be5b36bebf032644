"""Restoring in one process: exact, or an error that names what is wrong; and nothing is ever
executed."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.held_folder import HeldFolder
from opt_train.checkpoint.manifest import STATE, CheckpointError
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.save import save
from opt_train.checkpoint.tensors import ModelAndOptimizer, tensors_of

torch.set_num_threads(1)


class Tied(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(torch.relu(self.layer(self.embedding(tokens))))


def made(seed: int, **keys: float) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, torch.optim.AdamW(
        model.parameters(), **{"lr": 0.01, "betas": (0.9, 0.95), "fused": True, **keys}
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        tokens = torch.randint(0, 9, (8,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def commit(folder: Path, tensors: dict[str, torch.Tensor], step: int = 1) -> manifests.Manifest:
    files = {file.path: (file.bytes, file.sha256) for file in save(tensors, {"step": step}, folder)}
    sha256 = commit_manifest(folder, build_manifest(folder, "1.00", step, files))
    return manifests.verify(folder, sha256)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype
        for name, tensor in one.items()
    )


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model, optimizer).items()}


def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer = made(0)
    train(model, optimizer, 0, 3)
    manifest = commit(tmp_path / "c", tensors_of(model, optimizer))
    again, its_optimizer = made(1)
    moved: list[tuple[int, int]] = []
    restore(
        ModelAndOptimizer(again, its_optimizer),
        tmp_path / "c",
        manifest,
        progress=lambda done, total: moved.append((done, total)),
    )
    assert moved[-1] == (manifest.bytes, manifest.bytes)
    assert same(copied(again, its_optimizer), copied(model, optimizer))
    assert again.seen.tolist() == [3, 3]
    assert again.head.weight is again.embedding.weight
    assert train(again, its_optimizer, 3, 4) == train(model, optimizer, 3, 4)


def test_names_are_the_model_s_and_a_tied_weight_stands_once() -> None:
    model, optimizer = made(0)
    names = tensors_of(model, optimizer).keys()
    assert names >= {
        "model.embedding.weight",
        "model.layer.bias",
        "model.seen",
        "optimizer.layer.bias.exp_avg_sq",
    }
    assert not any("head" in name for name in names)
    assert len(names) == 4 + 3 * 3


def test_wrappers_do_not_change_the_names() -> None:
    """A checkpoint of a compiled or recomputing model restores into one that is not."""
    model, optimizer = made(0)
    plain = tensors_of(model, optimizer).keys()
    wrapped, _ = made(0)
    wrapped.embedding = checkpoint_wrapper(wrapped.embedding)
    wrapped.layer = torch.compile(wrapped.layer)
    its_optimizer = torch.optim.AdamW(wrapped.parameters(), fused=True)
    assert tensors_of(wrapped, its_optimizer).keys() == plain


def test_what_the_optimizer_is_told_is_not_overruled_by_the_checkpoint(tmp_path: Path) -> None:
    """OPT-175B's runs 12.35-12.37: new betas were silently replaced by the checkpoint's."""
    model, optimizer = made(0, lr=0.01)
    train(model, optimizer, 0, 2)
    manifest = commit(tmp_path / "c", tensors_of(model, optimizer))
    again, its_optimizer = made(1, lr=0.5, weight_decay=0.25, eps=1e-4, betas=(0.5, 0.6))
    restore(ModelAndOptimizer(again, its_optimizer), tmp_path / "c", manifest)
    (group,) = its_optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["eps"], group["betas"]) == (
        0.5,
        0.25,
        1e-4,
        (0.5, 0.6),
    )
    assert {float(state["step"]) for state in its_optimizer.state.values()} == {2.0}


def test_weights_alone_can_be_restored_for_evaluation(tmp_path: Path) -> None:
    model, optimizer = made(0)
    train(model, optimizer, 0, 2)
    manifest = commit(tmp_path / "c", tensors_of(model, optimizer))
    again, _ = made(1)
    restore(ModelAndOptimizer(again, None), tmp_path / "c", manifest)
    assert same(tensors_of(again, None), tensors_of(model, None))


class Counting(torch.optim.Optimizer):
    """Its state has an int, a float and a 0-dimensional tensor, as some optimizers' have."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {"lr": 0.1})  # type: ignore[arg-type]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state["rate"] = state.get("rate", 1.0) / 3
            state["scale"] = state.get("scale", torch.tensor(1.0)) / 3


def test_numbers_in_the_optimizer_s_state_come_back_exactly(tmp_path: Path) -> None:
    model, _ = made(0)
    optimizer = Counting(model.parameters())
    for _ in range(5):
        optimizer.step()
    manifest = commit(tmp_path / "c", tensors_of(model, optimizer))
    again, _ = made(1)
    its_optimizer = Counting(again.parameters())
    restore(ModelAndOptimizer(again, its_optimizer), tmp_path / "c", manifest)
    for one, other in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True):
        assert (
            (one["step"], one["rate"])
            == (other["step"], other["rate"])
            == (5, 1 / 3 / 3 / 3 / 3 / 3)
        )
        assert isinstance(other["step"], int)
        assert torch.equal(one["scale"], other["scale"])


def test_an_optimizer_with_state_that_is_no_number_is_refused_and_named() -> None:
    model, optimizer = made(0)
    train(model, optimizer, 0, 1)
    optimizer.state[model.layer.bias]["note"] = "text"
    with pytest.raises(CheckpointError, match=r"optimizer's state cannot be saved: .*str"):
        tensors_of(model, optimizer)


# What is not as it should be ----------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name, None)


def replaced(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("model.layer.bias"), r"tensor model.layer.bias is not in it"),
        (without("optimizer.layer.bias.step"), r"tensor optimizer.layer.bias.step is not in it"),
        (
            replaced("model.other", torch.ones(1)),
            r"its tensor model.other belongs to no part of this model",
        ),
        (
            replaced("optimizer.other.step", torch.ones(1)),
            r"its tensor optimizer.other.step belongs to no part",
        ),
        (
            replaced("model.layer.bias", torch.ones(5)),
            r"tensor model.layer.bias has shape \[5\] in it and \[6\] here",
        ),
        (
            replaced("model.layer.bias", torch.ones(6, 1)),
            r"model.layer.bias has shape \[6, 1\] in it and \[6\] here",
        ),
        (
            replaced("model.layer.bias", torch.ones(6).bfloat16()),
            r"has type torch.bfloat16 in it and torch.float32",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error_that_names_the_tensor(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], sentence: str
) -> None:
    """The loader itself would convert types and pass over what it does not know."""
    tensors = copied(*made(0))
    change(tensors)
    manifest = commit(tmp_path / "c", tensors)
    model, optimizer = made(1)
    before = copied(model, optimizer)
    with pytest.raises(CheckpointError, match=sentence):
        restore(ModelAndOptimizer(model, optimizer), tmp_path / "c", manifest)
    assert same(copied(model, optimizer), before)


def test_a_flip_in_any_region_of_a_shard_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "c"
    manifest = commit(folder, copied(*made(0)))
    (shard,) = folder.glob("*.safetensors")
    good = shard.read_bytes()
    header = int.from_bytes(good[:8], "little")
    model, optimizer = made(1)
    before = copied(model, optimizer)
    # The length of the header, its JSON, its end, the first tensor, some in the middle, the last
    # byte.
    places = {
        0,
        7,
        8,
        8 + header // 2,
        8 + header - 1,
        8 + header,
        len(good) - 1,
        *range(9, len(good), 97),
    }
    for where in sorted(places):
        content = bytearray(good)
        content[where] ^= 4
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"safetensors has a wrong checksum"):
            restore(ModelAndOptimizer(model, optimizer), folder, manifest)
    for length in (0, 5, 8 + header, len(good) - 1):
        shard.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"safetensors has \d+ bytes instead of"):
            restore(ModelAndOptimizer(model, optimizer), folder, manifest)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors is missing"):
        restore(ModelAndOptimizer(model, optimizer), folder, manifest)
    assert same(copied(model, optimizer), before)
    shard.write_bytes(good)
    restore(ModelAndOptimizer(model, optimizer), folder, manifest)


def test_a_shard_that_vanished_from_the_manifest_too_leaves_no_tensor_half_loaded(
    tmp_path: Path,
) -> None:
    """A manifest that vouches for too little: the loader would leave the missing rows as they are
    and say nothing."""
    folder = tmp_path / "c"
    manifest = commit(folder, copied(*made(0)))
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    # The first rows are missing: the stored size, seen from the last rows alone, is right.
    tensors["model.layer.weight"] = tensors["model.layer.weight"][3:].clone()
    offsets["model.layer.weight"] = {"saved_offsets": [3, 0]}
    save_file(tensors, shard, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    content = shard.read_bytes()
    files = {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()}
    files[shard.name] = (len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(
        CheckpointError, match=r"tensor model.layer.weight is incomplete in it: a shard is missing"
    ):
        restore(ModelAndOptimizer(*made(1)), folder, build_manifest(folder, "1.00", 1, files))


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.write_text, (self.path, "executed"))


def test_a_planted_pickle_executes_nothing(tmp_path: Path) -> None:
    folder, canary = tmp_path / "c", tmp_path / "canary"
    model, optimizer = made(0)
    commit(folder, tensors_of(model, optimizer))
    for name in (
        ".metadata",
        "__0_0.distcp",
        "model.pt",
        "optimizer.pth",
        "data.pkl",
        "model.safetensors.index.json",
    ):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    again, its_optimizer = made(1)
    restore(ModelAndOptimizer(again, its_optimizer), folder, manifests.verify(folder))
    assert same(copied(again, its_optimizer), copied(model, optimizer))
    assert not canary.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert canary.exists()  # so it would have sung


def test_saving_over_a_committed_checkpoint_is_refused(tmp_path: Path) -> None:
    tensors = copied(*made(0))
    manifest = commit(tmp_path / "c", tensors)
    with pytest.raises(CheckpointError, match=r"it is a committed checkpoint already"):
        save(tensors, {}, tmp_path / "c")
    assert manifests.verify(tmp_path / "c") == manifest


def test_a_save_does_not_bring_a_removed_run_back(tmp_path: Path) -> None:
    run = tmp_path / "removed"
    with pytest.raises(CheckpointError, match=r"cannot be prepared"):
        save(copied(*made(0)), {}, run / "checkpoints" / "1.00" / "step-00000004")
    assert not run.exists()


def test_a_save_does_not_write_into_the_run_that_replaced_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    held = HeldFolder(run)
    run.rmdir()
    run.mkdir()
    folder = run / "checkpoints" / "1.00" / "step-00000004"
    with pytest.raises(CheckpointError, match=r"was removed, and another is in its place"):
        save(copied(*made(0)), {}, folder, run_folder=held)
    assert list(run.iterdir()) == []
    save(copied(*made(0)), {}, folder, run_folder=HeldFolder(run))
    assert folder.exists()


def test_what_an_aborted_save_left_is_harmless(tmp_path: Path) -> None:
    """A shard of a larger, dead generation in the same folder would be read as part of the
    checkpoint."""
    folder = tmp_path / "c"
    folder.mkdir()
    for name in ("shard-00007-model-00001-of-00001.safetensors", STATE, "manifest.json.partial"):
        (folder / name).write_bytes(b"left over")
    manifest = commit(folder, copied(*made(0)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*manifest.files, "manifest.json"]
    )
    restore(ModelAndOptimizer(*made(1)), folder, manifest)
