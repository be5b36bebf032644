"""Batches: the same global batch for every number of ranks, and no shard that lies about itself."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_train.data.batch_shares import micro_batches_of, share_of
from opt_train.data.batches import Batches, MicroBatch, ValidationSet
from opt_train.data.garbage import GarbageBatches
from opt_train.data.manifest import DATASET_FILE, TOKENIZER_FILE, DatasetManifest, Shard, check_fits
from opt_train.data.order import Cursor, SampleOrder
from opt_train.data.token_stream import TokenStream, open_split
from opt_train.data.tokenizer import PAD
from opt_train.data.verify import verify_dataset
from opt_train.protocol.exits import BadInput

SEQUENCE = 4


def stream(tokens: int, cuts: tuple[int, ...] = ()) -> TokenStream:
    return TokenStream(list(np.split(np.arange(tokens, dtype=np.uint16), cuts)))


def sequences_of(micro_batches: list[MicroBatch]) -> list[list[int]]:
    """The sequences that count, each with its last target."""
    rows = []
    for batch in micro_batches:
        for tokens, targets, weight in zip(batch.tokens, batch.targets, batch.weights, strict=True):
            assert torch.equal(tokens[1:], targets[:-1])
            if weight:
                rows.append([*tokens.tolist(), int(targets[-1])])
    return rows


@pytest.mark.parametrize("world", range(1, 9))
def test_every_number_of_ranks_reads_the_same_global_batch(world: int) -> None:
    batches = Batches(stream(401), SEQUENCE, global_batch=13, seed=5)
    order = SampleOrder(100, 5)
    cursor = Cursor(95)  # runs into the second epoch
    expected = [
        list(range(index * SEQUENCE, index * SEQUENCE + SEQUENCE + 1))
        for index in map(order.index, range(95, 108))
    ]
    shares = [
        batches.at(cursor, data_rank=rank, data_world=world, micro_batch=2) for rank in range(world)
    ]
    assert [row for share in shares for row in sequences_of(share)] == expected
    assert batches.after(cursor) == Cursor(108)


@given(count=st.integers(0, 50), world=st.integers(1, 12))
def test_shares_are_contiguous_and_differ_by_at_most_one(count: int, world: int) -> None:
    shares = [share_of(count, rank, world) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares))


@pytest.mark.parametrize(
    ("world", "micro_batch"), [(1, 13), (2, 4), (3, 2), (5, 8), (8, 1), (20, 3)]
)
def test_all_ranks_run_the_same_collectives(world: int, micro_batch: int) -> None:
    """Ranks with fewer sequences get padding of weight 0, or they would leave the others
    waiting."""
    batches = Batches(stream(401), SEQUENCE, global_batch=13, seed=0)
    shapes = set()
    for rank in range(world):
        share = batches.at(Cursor(), data_rank=rank, data_world=world, micro_batch=micro_batch)
        shapes.add(tuple(tuple(batch.tokens.shape) for batch in share))
        for batch in share:
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert batch.weights.dtype == torch.float32
            assert batch.tokens.shape == batch.targets.shape == (len(batch.weights), SEQUENCE)
            assert set(batch.weights.tolist()) <= {0.0, 1.0}
    assert len(shapes) == 1
    assert all(shape[0] <= micro_batch for shape in shapes.pop())


@given(share=st.integers(1, 3000), micro_batch=st.integers(1, 70))
def test_micro_batches_hold_the_share_and_are_few(share: int, micro_batch: int) -> None:
    """Nothing is left out, nothing is larger than asked for, and padding is not saved at any
    price."""
    number, rows = micro_batches_of(share, micro_batch)
    fewest = -(-share // micro_batch)
    assert rows <= micro_batch
    assert share <= number * rows
    assert share > (number - 1) * rows or number == fewest
    assert fewest <= number <= 2 * fewest
    assert number == fewest or number * rows < fewest * -(-share // fewest)


@pytest.mark.parametrize(
    ("share", "micro_batch", "expected"), [(1009, 8, (127, 8)), (10, 4, (5, 2)), (5, 4, (2, 3))]
)
def test_a_little_padding_is_better_than_many_micro_batches(
    share: int, micro_batch: int, expected: tuple[int, int]
) -> None:
    assert micro_batches_of(share, micro_batch) == expected


@pytest.mark.parametrize(
    ("micro_batch", "shape"), [(1, (9, 1)), (4, (3, 3)), (5, (3, 3)), (8, (3, 3)), (9, (1, 9))]
)
def test_micro_batches_are_even_so_that_little_is_padding(
    micro_batch: int, shape: tuple[int, int]
) -> None:
    """A node lost leaves 9 sequences where 8 were: 8 and then 1 with 7 of padding would cost nearly
    half the step."""
    batches = Batches(stream(401), SEQUENCE, global_batch=9, seed=0)
    share = batches.at(Cursor(), data_rank=0, data_world=1, micro_batch=micro_batch)
    assert (len(share), len(share[0].tokens)) == shape


@pytest.mark.parametrize("left_over", [0, 1, SEQUENCE - 1])
def test_an_epoch_predicts_every_token_of_whole_sequences_once(left_over: int) -> None:
    batches = Batches(stream(41 + left_over), SEQUENCE, global_batch=10, seed=1)
    assert batches.order.samples == 10
    (share,) = batches.at(Cursor(), data_rank=0, data_world=1, micro_batch=10)
    assert sorted(share.targets.flatten().tolist()) == list(range(1, 41))


@given(
    tokens=st.integers(2, 60),
    cuts=st.lists(st.integers(1, 59), max_size=5, unique=True).map(sorted),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_shard_borders_do_not_show(tokens: int, cuts: list[int], data: st.DataObject) -> None:
    whole = stream(tokens, tuple(cut for cut in cuts if cut < tokens))
    start = data.draw(st.integers(0, tokens - 1))
    count = data.draw(st.integers(0, tokens - start))
    assert whole.read(start, count).tolist() == list(range(start, start + count))


def test_reading_beyond_the_end_is_an_error_and_not_a_shorter_read() -> None:
    with pytest.raises(IndexError):
        stream(10).read(8, 3)


@pytest.mark.parametrize("world", range(1, 6))
def test_validation_reads_every_sequence_once_whatever_the_ranks(world: int) -> None:
    validation = ValidationSet(stream(46), SEQUENCE)
    assert validation.sequences == 11
    shares = [
        list(validation.share(data_rank=rank, data_world=world, micro_batch=3))
        for rank in range(world)
    ]
    rows = [row for share in shares for row in sequences_of(share)]
    assert rows == [list(range(i * SEQUENCE, i * SEQUENCE + SEQUENCE + 1)) for i in range(11)]
    assert len({tuple(tuple(batch.tokens.shape) for batch in share) for share in shares}) == 1


@pytest.mark.parametrize("kind", [Batches, ValidationSet])
def test_a_split_shorter_than_a_sequence_is_bad_input(kind: type) -> None:
    arguments = {"global_batch": 1, "seed": 0} if kind is Batches else {}
    with pytest.raises(BadInput, match=r"data.sequence_length=10 needs 11 tokens"):
        kind(stream(10), 10, **arguments)


# Shards on disk -----------------------------------------------------------------------------------


TOKENIZER = b'{"version": "1.0"}'


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    shards = []
    for split, number, first, count in (
        ("train", 0, 0, 30),
        ("train", 1, 30, 12),
        ("validation", 0, 50, 9),
    ):
        content = np.arange(first, first + count).astype("<u2").tobytes()
        name = f"{split}-{number:05d}.bin"
        (tmp_path / name).write_bytes(content)
        shards.append(Shard(name, split, count, len(content), hashlib.sha256(content).hexdigest()))
    (tmp_path / TOKENIZER_FILE).write_bytes(TOKENIZER)
    manifest_with(shards).write(tmp_path)
    return tmp_path


def manifest_with(shards: list[Shard]) -> DatasetManifest:
    return DatasetManifest(
        name="counting",
        fingerprint="f",
        tokenizer="bpe",
        tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
        vocab_size=300,
        eos=2,
        dtype="uint16",
        train_tokens=42,
        validation_tokens=9,
        documents=3,
        unigram_perplexity=12.5,
        shards=tuple(shards),
        configuration={"data.corpus": "x", "data.validation_fraction": 0.02},
    )


def test_a_manifest_survives_writing(prepared: Path) -> None:
    manifest = DatasetManifest.read(prepared)
    assert manifest == manifest_with(list(manifest.shards))
    assert [shard.path for shard in manifest.shards_of("train")] == [
        "train-00000.bin",
        "train-00001.bin",
    ]


def test_splits_are_read_across_their_shards(prepared: Path) -> None:
    moved: list[tuple[int, int]] = []
    tokens = open_split(
        prepared, "train", verify=True, progress=lambda done, total: moved.append((done, total))
    )
    assert tokens.read(0, len(tokens)).tolist() == list(range(42))
    assert moved[-1] == (84, 84)
    validation = open_split(prepared, "validation", verify=False)
    assert validation.read(0, 9).tolist() == list(range(50, 59))


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00001.bin"])
@pytest.mark.parametrize("where", [0, 11, -1])
def test_a_flipped_bit_in_any_shard_is_found_and_the_file_named(
    prepared: Path, name: str, where: int
) -> None:
    content = bytearray((prepared / name).read_bytes())
    content[where] ^= 1
    (prepared / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name} has a wrong checksum.*opt-train prepare"):
        open_split(prepared, "train", verify=True)
    open_split(prepared, "validation", verify=True)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_cut_shard_is_found_even_without_checksums(
    prepared: Path, verify: bool
) -> None:
    shard = prepared / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(BadInput, match=r"train-00001.bin has 22 bytes instead of 24"):
        open_split(prepared, "train", verify=verify)
    shard.unlink()
    with pytest.raises(BadInput, match=r"train-00001.bin is missing"):
        open_split(prepared, "train", verify=verify)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"shards": 3}', '{"name": "x", "shards": [{"path": 1}]}', "\0\0"],
)
def test_a_damaged_manifest_is_bad_input(prepared: Path, content: str) -> None:
    (prepared / DATASET_FILE).write_text(content)
    with pytest.raises(BadInput, match=r"dataset.json is damaged .*; delete the folder"):
        DatasetManifest.read(prepared)


Payload = dict[str, Any]


def put(key: str, value: object) -> Callable[[Payload], object]:
    return lambda payload: payload.update({key: value})


def put_in_shard(key: str, value: object) -> Callable[[Payload], object]:
    return lambda payload: payload["shards"][1].update({key: value})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (put("vocab_size", "x"), "vocab_size is not a whole number"),
        (put("vocab_size", True), "vocab_size is not a whole number"),
        (put("vocab_size", 300.5), "vocab_size is not a whole number"),
        (put("vocab_size", 0), "a count is negative or zero"),
        (put("eos", None), "eos is not a whole number"),
        (put("name", 3), "name is not text"),
        (put("tokenizer_sha256", []), "tokenizer_sha256 is not text"),
        (put("unigram_perplexity", "12"), "unigram_perplexity is not a number"),
        (put("dtype", "bogus"), "dtype is neither uint16 nor uint32"),
        (put("dtype", "uint32"), "the tokens and bytes of train-00000.bin do not agree"),
        (put("train_tokens", 43), "the train shards do not hold 43 tokens in all"),
        (put("configuration", []), "configuration does not map keys to values"),
        (put("configuration", {"data.corpus": []}), "configuration does not map keys to values"),
        (put("shards", 3), "shards is not a list"),
        (put("shards", {}), "shards is not a list"),
        (put("shards", ["x"]), "'x' is not a JSON object"),
        (put_in_shard("bytes", "24"), "bytes is not a whole number"),
        (put_in_shard("path", None), "path is not text"),
        (put_in_shard("split", "trian"), "the train shards do not hold 42 tokens in all"),
        (lambda payload: payload["shards"][1].pop("sha256"), "sha256 is missing"),
        (
            lambda payload: payload["shards"].pop(),
            "the validation shards do not hold 9 tokens in all",
        ),
        (lambda payload: payload.pop("eos"), "eos is missing"),
    ],
)
def test_one_wrong_value_in_a_manifest_is_damage(
    prepared: Path, damage: Callable[[Payload], object], why: str
) -> None:
    payload = json.loads((prepared / DATASET_FILE).read_text())
    damage(payload)
    (prepared / DATASET_FILE).write_text(json.dumps(payload))
    with pytest.raises(BadInput) as raised:
        DatasetManifest.read(prepared)
    assert f"dataset.json is damaged ({why}); delete the folder" in str(raised.value)


def test_fields_of_a_newer_version_are_no_damage(prepared: Path) -> None:
    before = DatasetManifest.read(prepared)
    payload = json.loads((prepared / DATASET_FILE).read_text())
    put("licence", "CC0")(payload)
    put_in_shard("documents", 3)(payload)
    (prepared / DATASET_FILE).write_text(json.dumps(payload))
    assert DatasetManifest.read(prepared) == before


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "train-00001.bin", "validation-00000.bin", TOKENIZER_FILE]
)
def test_a_changed_file_of_any_kind_is_found_before_a_run(prepared: Path, name: str) -> None:
    verify_dataset(prepared)
    content = bytearray((prepared / name).read_bytes())
    content[3] ^= 1
    (prepared / name).write_bytes(content)
    with pytest.raises(
        BadInput, match=rf"{name} has a wrong checksum.*; delete the folder .* `opt-train prepare`"
    ):
        verify_dataset(prepared)
    (prepared / name).unlink()
    with pytest.raises(
        BadInput, match=rf"{name} is missing; delete the folder .* `opt-train prepare` again"
    ):
        verify_dataset(prepared)


def test_unprepared_data_says_how_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run `opt-train prepare` first"):
        open_split(tmp_path / "nothing", "train", verify=True)


def test_data_that_the_model_cannot_read_is_refused() -> None:
    manifest = manifest_with([])
    check_fits(manifest, vocab_size=300, sequence_length=8)
    with pytest.raises(BadInput, match=r"model.vocab_size=299 is smaller than the 300 entries"):
        check_fits(manifest, vocab_size=299, sequence_length=8)
    with pytest.raises(
        BadInput, match=r"data.sequence_length=9 needs 10 tokens but the validation split .* has 9"
    ):
        check_fits(manifest, vocab_size=300, sequence_length=9)


def test_garbage_is_the_same_for_every_number_of_ranks_and_nothing_else_changes() -> None:
    whole = Batches(stream(401), SEQUENCE, global_batch=4, seed=5)
    damaged = GarbageBatches(stream(401), SEQUENCE, 4, 5, garbage=range(2, 4), vocab_size=50)

    def tokens(batches: Batches, number: int, world: int) -> list[list[int]]:
        shares = [
            batches.at(Cursor(4 * number), data_rank=rank, data_world=world, micro_batch=4)
            for rank in range(world)
        ]
        return sorted(row for [share] in shares for row in share.tokens.tolist())

    for number in range(6):
        same = tokens(whole, number, 1) == tokens(damaged, number, 1)
        assert same == (number not in (2, 3))
        assert tokens(damaged, number, 1) == tokens(damaged, number, 2)
    [micro_batch] = damaged.at(Cursor(8), data_rank=0, data_world=1, micro_batch=4)
    assert micro_batch.tokens[:, 1:].equal(micro_batch.targets[:, :-1])
    assert micro_batch.tokens.min() > PAD
    assert micro_batch.tokens.max() < 50
