"""A rank's state in memory: exact, readable on any layout, or one error; and what is written next
does not reach it."""

import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opt_train.checkpoint.load import load_own
from opt_train.checkpoint.manifest import CheckpointError, FileEntry, Manifest, own_file_name
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.safetensors_file import header_of
from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshots
from opt_train.checkpoint.tensors import ModelAndOptimizer, tensors_of
from opt_train.protocol.facts import MemoryFile
from tests.checkpoint.test_restore import Counting, copied, made, same, train
from tests.train.rig import run_script

CPU = torch.device("cpu")
SCRIPT = Path(__file__).with_name("snapshot_ranks.py")


def content_of(file: MemoryFile) -> bytes:
    """As an agent reads it: through the rank's descriptor in /proc."""
    return Path(f"/proc/{os.getpid()}/fd/{file.fd}").read_bytes()


def taken(tensors: dict[str, torch.Tensor], folder: Path) -> tuple[Path, Manifest]:
    """A snapshot of rank 0, its file in `folder`, and the manifest that vouches for it."""
    files = Snapshots(0, 1, CPU).begin(1, tensors, {"step": 1, PARTS: OWN, "world_size": 1}).files()
    folder.mkdir()
    for file in files:
        (folder / file.path).write_bytes(content_of(file))
    entries = {file.path: FileEntry(file.bytes, file.sha256) for file in files}
    state = json.loads((folder / "state.json").read_bytes())
    return folder / own_file_name(0), Manifest("1.00", 1, entries, state)


def ranks(folder: Path, world: int, *cases: list[Any]) -> dict[str, Any]:
    """What rank 0 of `snapshot_ranks.py` found."""
    return run_script(SCRIPT, world, json.dumps(cases), str(folder), folder=folder)[0]


def test_ranks_restore_each_from_its_own_file_and_any_layout_from_all(tmp_path: Path) -> None:
    full = {"activation_checkpointing": "full"}
    found = ranks(
        tmp_path,
        2,
        ["sharded", [1, 2, 1], full, "fp32", "evaluation"],
        ["replicated", [2, 1, 1], {}, "fp32", ""],
        ["tensor", [1, 1, 2], {}, "fp32", ""],
        ["fp16", [1, 2, 1], {}, "memory-efficient fp16", ""],
        ["raised", [1, 2, 1], {}, "fp32", "raised"],
    )
    assert found["replicated"]["own"] > found["replicated"]["tensors"]  # a replica has all of it
    assert found["sharded"]["own"] < 0.6 * found["sharded"]["tensors"]
    one = [
        [name, [1, 1, 1], {}, "fp32", "read"]
        for name in ("sharded", "replicated", "tensor", "raised")
    ]
    ranks(tmp_path, 1, *one, ["fp16", [1, 1, 1], {}, "memory-efficient fp16", "read"])


@pytest.mark.slow
def test_shards_of_a_tensor_group_have_their_place_too(tmp_path: Path) -> None:
    """FSDP cuts what tensor parallelism has cut already along the same dimension."""
    ranks(tmp_path, 4, ["both", [1, 2, 2], {}, "fp32", ""])


@pytest.mark.whole
def test_compiled_and_recomputing_blocks_are_alike(tmp_path: Path) -> None:
    ways = {"compile": True, "activation_checkpointing": "full"}
    ranks(tmp_path, 2, ["compiled", [1, 2, 1], ways, "fp32", "evaluation"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fairscale", "deepspeed"])
def test_other_engines_snapshots_are_alike(engine: str, tmp_path: Path) -> None:
    ranks(tmp_path, 2, [engine, [1, 2, 1], {"engine": engine}, "fp32", ""])


def test_a_restored_rank_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer = made(0)
    train(model, optimizer, 0, 3)
    file, manifest = taken(tensors_of(model, optimizer), tmp_path / "c")
    again, its_optimizer = made(1)
    restore(ModelAndOptimizer(again, its_optimizer), file.parent, manifest, rank_file=file)
    assert same(copied(again, its_optimizer), copied(model, optimizer))
    assert again.head.weight is again.embedding.weight
    assert train(again, its_optimizer, 3, 4) == train(model, optimizer, 3, 4)


def test_numbers_in_the_optimizer_s_state_come_back_exactly(tmp_path: Path) -> None:
    model, _ = made(0)
    optimizer = Counting(model.parameters())
    for _ in range(5):
        optimizer.step()
    file, _ = taken(tensors_of(model, optimizer), tmp_path / "c")
    again, _ = made(1)
    its_optimizer = Counting(again.parameters())
    load_own(ModelAndOptimizer(again, its_optimizer), file)
    for one, other in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True):
        assert (one["step"], one["rate"]) == (other["step"], other["rate"])
        assert isinstance(other["step"], int)


def test_what_changes_after_the_copy_does_not_reach_the_file() -> None:
    """40 MB, so that whoever did not wait for the copy would be seen in it."""
    tensors = {f"model.{n}": torch.full((1_000_000,), float(n)) for n in range(10)}
    snapshots = Snapshots(3, 1, CPU)
    hashes = set()
    for step in range(4):  # in memory that is new, and in memory that is not
        for number, tensor in enumerate(tensors.values()):
            tensor.fill_(float(number))
        snapshot = snapshots.begin(step, tensors)
        snapshot.wait_copied()
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        (file,) = snapshot.files()
        assert file.path == "shard-00003.safetensors"
        assert hashlib.sha256(content_of(file)).hexdigest() == file.sha256
        assert snapshot.seconds > 0
        hashes.add(file.sha256)
    assert len(hashes) == 1


def test_the_newest_stay_whole_and_the_oldest_is_written_over() -> None:
    """Somebody who held a descriptor for too long finds out by its hash."""
    tensors = {"model.a": torch.zeros(1000)}
    snapshots = Snapshots(0, 2, CPU)
    files = []
    for step in range(4):
        tensors["model.a"].fill_(float(step))
        files.append(snapshots.begin(step, tensors, {"step": step}).files())
        whole = [
            all(hashlib.sha256(content_of(f)).hexdigest() == f.sha256 for f in each)
            for each in files
        ]
        assert all(whole[-3:])
    assert whole == [False, True, True, True]
    assert [file.fd for file in files[0]] == [file.fd for file in files[3]]


def test_the_state_is_what_a_save_writes_byte_for_byte() -> None:
    state = {"step": 3, "words": "größer", "nothing": float("nan"), "long": list(range(2000))}
    snapshots = Snapshots(0, 1, CPU)
    snapshots.begin(1, {"model.a": torch.zeros(2)}, {**state, "more": "x" * 1000}).files()
    for _ in range(2):  # the second goes over the long one
        _, file = snapshots.begin(2, {"model.a": torch.zeros(2)}, state).files()
    expected = json.dumps({**state, "nothing": "NaN"}, indent=1, ensure_ascii=False) + "\n"
    assert content_of(file) == expected.encode()
    assert file.bytes == len(expected.encode())


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Limits the size of files, those in memory too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_memory_there_is_no_snapshot_and_no_harm(
    little_memory: Callable[[int], None],
) -> None:
    tensors = {"model.a": torch.ones(1 << 20)}
    snapshots = Snapshots(0, 1, CPU)
    (before,) = snapshots.begin(1, tensors).files()
    tensors["model.b"] = torch.ones(1 << 20)
    little_memory(1 << 20)
    failed = snapshots.begin(2, tensors)
    failed.wait_copied()
    with pytest.raises(
        CheckpointError, match=r"no memory for the snapshot of step 2: File too large"
    ):
        failed.files()
    assert hashlib.sha256(content_of(before)).hexdigest() == before.sha256
    little_memory(1 << 30)
    (file,) = snapshots.begin(3, tensors).files()
    assert file.bytes > 8 << 20


# What is not as it should be ----------------------------------------------------------------------


def test_a_torn_or_flipped_file_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file, manifest = taken(copied(*made(0)), tmp_path / "c")
    good = file.read_bytes()
    header = int.from_bytes(good[:8], "little")
    into = ModelAndOptimizer(*made(1))
    before = copied(into.model, into.optimizer)
    for where in (0, 7, 8, 8 + header // 2, 8 + header, len(good) - 1):
        content = bytearray(good)
        content[where] ^= 4
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"shard-00000.safetensors has a wrong checksum"):
            restore(into, file.parent, manifest, rank_file=file)
    for length in (0, 5, 8 + header // 2, 8 + header, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"shard-00000.safetensors has "):
            restore(into, file.parent, manifest, rank_file=file)
        with pytest.raises(
            CheckpointError, match=r"cannot be restored: shard-00000.safetensors is damaged"
        ):
            load_own(into, file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000.safetensors is missing"):
        restore(into, file.parent, manifest, rank_file=file)
    with pytest.raises(
        CheckpointError, match=r"shard-00000.safetensors cannot be read: No such file"
    ):
        load_own(into, file)
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is not in the manifest"):
        restore(into, file.parent, manifest, rank_file=file.with_name(own_file_name(1)))
    assert same(copied(into.model, into.optimizer), before)


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.layer.bias"), r"tensor model.layer.bias is not in it"),
        (
            lambda t: t.pop("optimizer.layer.bias.step"),
            r"tensor optimizer.layer.bias.step is not in it",
        ),
        (
            lambda t: t.update({"model.other": torch.ones(1)}),
            r"its tensor model.other belongs to no part of this",
        ),
        (
            lambda t: t.update({"model.layer.bias": torch.ones(5)}),
            r"layer.bias has shape \[5\] in it and \[6\] here",
        ),
        (
            lambda t: t.update({"model.layer.bias": torch.ones(6).bfloat16()}),
            r"has type torch.bfloat16 in it and tor",
        ),
    ],
)
def test_another_rank_s_or_model_s_file_is_an_error_that_names_the_tensor(
    tmp_path: Path, change: Change, sentence: str
) -> None:
    tensors = copied(*made(0))
    change(tensors)
    file, manifest = taken(tensors, tmp_path / "c")
    into = ModelAndOptimizer(*made(1))
    before = copied(into.model, into.optimizer)
    with pytest.raises(CheckpointError, match=sentence):
        restore(into, file.parent, manifest, rank_file=file)
    assert same(copied(into.model, into.optimizer), before)


class One(nn.Module):
    """A single weight, [2]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


ENTRY = '"model.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
OFFSETS = '"__metadata__":{"DCP_SHARDING_INFO":"{\\"model.weight\\":{\\"saved_offsets\\":[0]}}"}'


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("{" + ENTRY + "," + OFFSETS + "}", ""),
        ("{" + ENTRY + "}", ""),  # of no parts, so of all
        (
            "{" + ENTRY + "," + OFFSETS.replace("model.weight", "other") + "}",
            r"does not say where its tensors belong",
        ),
        (
            "{" + ENTRY + "," + OFFSETS.replace("[0]", "[4]") + "}",
            r"model.weight begins at \[4\] of the whole in it",
        ),
        (
            "{" + ENTRY + "," + OFFSETS.replace("[0]", "7") + "}",
            r"does not say where its tensors belong",
        ),
        ("{" + ENTRY + ',"__metadata__":{"a":1}}', r"does not hold texts"),
        ("{" + ENTRY + "," + ENTRY + "," + OFFSETS + "}", r"a name stands in it twice"),
        (
            "{" + ENTRY.replace("[0,8]", "[0,16]") + "," + OFFSETS + "}",
            r"has shape \[2\] and 16 bytes",
        ),
        ("{" + ENTRY.replace("[0,8]", "[-8,0]") + "," + OFFSETS + "}", r"no whole numbers"),
        ("{" + ENTRY.replace("[0,8]", "[4,12]") + "," + OFFSETS + "}", r"begins at byte"),
        (
            "{" + ENTRY.replace('"F32"', '["F32"]') + "," + OFFSETS + "}",
            r"has type .*, which is not known here",
        ),
        (
            "{" + ENTRY.replace('"F32"', '"F4"') + "," + OFFSETS + "}",
            r"has type 'F4', which is not known here",
        ),
        ("{" + ENTRY.replace("[2]", "[2.0]") + "," + OFFSETS + "}", r"no whole numbers"),
        (
            '{"model.weight":7,' + OFFSETS + "}",
            r"does not say type, shape and place of tensor model.weight",
        ),
        ("[" * 5000, r"its header is no JSON"),
        ("[]", r"its header is no JSON object"),
        ("{" + OFFSETS + "}", r"its tensors end at byte"),
    ],
)
def test_a_hostile_header_is_one_clear_error(tmp_path: Path, header: str, sentence: str) -> None:
    file = tmp_path / "shard-00000.safetensors"
    file.write_bytes(
        len(header).to_bytes(8, "little") + header.encode() + torch.ones(2).numpy().tobytes()
    )
    model = One()
    if not sentence:
        load_own(ModelAndOptimizer(model), file)
        assert model.weight.tolist() == [1.0, 1.0]
        return
    with pytest.raises(CheckpointError, match=sentence):
        load_own(ModelAndOptimizer(model), file)
    assert model.weight.tolist() == [0.0, 0.0]


def test_a_missing_rank_s_file_shows_though_replicas_hold_the_same(tmp_path: Path) -> None:
    """The reader drops what is there twice; what is then not there once is an error, and so are two
    that differ."""

    def put(rank: int, offset: int, rows: int) -> None:
        info = {"model.weight": {"saved_offsets": [offset]}}
        header = header_of(
            [("model.weight", torch.float32, (rows,))], {"DCP_SHARDING_INFO": json.dumps(info)}
        )
        (tmp_path / own_file_name(rank)).write_bytes(
            header + torch.full((rows,), rank + 1.0).numpy().tobytes()
        )

    def manifest() -> Manifest:
        files = {
            file.name: FileEntry(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
            for file in tmp_path.glob("*.safetensors")
        }
        return Manifest("1.00", 1, files, {PARTS: OWN})

    model = One()
    for rank, place in enumerate(((0, 1), (1, 1), (0, 1), (1, 1))):
        put(rank, *place)
    restore(ModelAndOptimizer(model), tmp_path, manifest())
    assert model.weight.tolist() in ([1.0, 2.0], [3.0, 4.0], [1.0, 4.0], [3.0, 2.0])
    for rank in (0, 2):
        (tmp_path / own_file_name(rank)).unlink()
    with pytest.raises(
        CheckpointError, match=r"tensor model.weight is incomplete in it: a shard is missing"
    ):
        restore(ModelAndOptimizer(model), tmp_path, manifest())
    put(0, 0, 1)
    put(2, 0, 2)
    with pytest.raises(
        CheckpointError, match=r"its files disagree about the part of tensor model.weight at \[0\]"
    ):
        restore(ModelAndOptimizer(model), tmp_path, manifest())
