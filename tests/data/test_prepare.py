"""Preparing data: all of it or nothing, once, whatever dies or refuses in between."""

import contextlib
import hashlib
import math
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from opt_train.data import tokenizer as bpe
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.corpus import is_held_out, open_corpus
from opt_train.data.manifest import DatasetManifest
from opt_train.data.prepare import prepare
from opt_train.data.prepared import check_prepared_by, directory_of
from opt_train.data.token_stream import open_split
from opt_train.protocol.exits import BadInput
from tests.train import forked
from tests.train.forked import Forked

VOCABULARY = TokenizerConfig(name="small", vocab_size=300)


def quiet(line: str) -> None:
    assert "\n" not in line


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:03d}.txt").write_text(
            f"document {number}: " + "some words of it " * (number + 1)
        )
    return folder


def config(corpus: Path, directory: Path, **keys: object) -> DataConfig:
    return DataConfig(
        name="tiny", corpus=str(corpus), directory=str(directory), validation_fraction=0.2, **keys
    )


def test_tokens_are_the_documents_in_order_joined_by_eos(corpus: Path, tmp_path: Path) -> None:
    data = config(corpus, tmp_path / "out", shard_tokens=1000)
    lines: list[str] = []
    manifest = prepare(data, VOCABULARY, lines.append)
    assert any("60 documents" in line for line in lines)
    tokenizer = bpe.load(tmp_path / "out" / "tokenizer.json")
    assert manifest.vocab_size == bpe.size_of(tokenizer) <= 300
    texts = list(open_corpus(data).documents())
    for split, tokens in (
        ("train", manifest.train_tokens),
        ("validation", manifest.validation_tokens),
    ):
        expected = []
        for text in texts:
            if is_held_out(text, 0.2) == (split == "validation"):
                expected += [*tokenizer.encode(text).ids, 2]
        stream = open_split(tmp_path / "out", split, verify=True)
        assert stream.read(0, len(stream)).tolist() == expected
        assert len(expected) == tokens
        shards = manifest.shards_of(split)
        assert all(shard.tokens == 1000 for shard in shards[:-1])
        assert all(0 < shard.tokens <= 1000 for shard in shards)
    assert manifest.documents == 60
    assert manifest.eos == 2


def test_shards_are_little_endian_numbers_with_their_own_hash(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    assert manifest.dtype == "uint16"
    for shard in manifest.shards:
        content = (tmp_path / "out" / shard.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        assert len(np.frombuffer(content, dtype="<u2")) == shard.tokens


def test_unigram_perplexity_is_what_a_person_computes(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    splits = {}
    for split in ("train", "validation"):
        stream = open_split(tmp_path / "out", split, verify=False)
        splits[split] = stream.read(0, len(stream)).tolist()
    counts = Counter(splits["train"])
    total = len(splits["train"]) + manifest.vocab_size
    nats = -sum(math.log((counts[token] + 1) / total) for token in splits["validation"]) / len(
        splits["validation"]
    )
    assert manifest.unigram_perplexity == pytest.approx(math.exp(nats), rel=1e-9)
    assert 1 < manifest.unigram_perplexity < manifest.vocab_size


def test_the_fingerprint_is_of_the_tokens_and_not_of_how_they_lie(
    corpus: Path, tmp_path: Path
) -> None:
    first = prepare(config(corpus, tmp_path / "a"), VOCABULARY, quiet)
    cut = prepare(config(corpus, tmp_path / "b", shard_tokens=777), VOCABULARY, quiet)
    less = prepare(config(corpus, tmp_path / "c", max_bytes=30_000), VOCABULARY, quiet)
    assert first.fingerprint == cut.fingerprint
    assert len(first.shards) < len(cut.shards)
    assert first.fingerprint != less.fingerprint


def test_prepared_data_is_returned_at_once_even_without_its_corpus(
    corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "corpus"
    copy.mkdir()
    for path in sorted(corpus.iterdir())[:10]:
        (copy / path.name).write_bytes(path.read_bytes())
    data = config(copy, tmp_path / "out")
    manifest = prepare(data, VOCABULARY, quiet)
    for path in copy.iterdir():
        path.unlink()
    told: list[str] = []
    assert prepare(data, VOCABULARY, told.append) == manifest
    assert told == []


def test_another_configuration_is_refused_and_the_difference_named(
    corpus: Path, tmp_path: Path
) -> None:
    prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    with pytest.raises(BadInput) as raised:
        prepare(
            config(corpus, tmp_path / "out"), TokenizerConfig(name="small", vocab_size=301), quiet
        )
    sentence = str(raised.value)
    assert "tokenizer.vocab_size was 300 and is 301" in sentence
    assert "another data.name or data.directory" in sentence
    prepare(config(corpus, tmp_path / "out", sequence_length=7, shard_tokens=5), VOCABULARY, quiet)


def test_who_reads_prepared_data_learns_that_another_configuration_made_it(
    corpus: Path, tmp_path: Path
) -> None:
    data = config(corpus, tmp_path / "out")
    manifest = prepare(data, VOCABULARY, quiet)
    check_prepared_by(manifest, data, VOCABULARY, tmp_path / "out")
    check_prepared_by(
        manifest, config(corpus, tmp_path / "out", sequence_length=7), VOCABULARY, tmp_path / "out"
    )
    for other, tokenizer in (
        (config(corpus, tmp_path / "out", max_bytes=9), VOCABULARY),
        (config(tmp_path, tmp_path / "out"), VOCABULARY),
        (data, TokenizerConfig(name="small", vocab_size=301)),
        (data, TokenizerConfig(name="small", vocab_file="v", merges_file="m")),
    ):
        with pytest.raises(
            BadInput, match=r"out was prepared by another configuration \("
        ) as raised:
            check_prepared_by(manifest, other, tokenizer, tmp_path / "out")
        with pytest.raises(BadInput) as same:
            prepare(other, tokenizer, quiet)
        assert str(raised.value) == str(same.value)


def test_a_folder_of_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(BadInput, match=r"exists and holds no prepared data"):
        prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear"
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"exists and holds no prepared data"):
        prepare(config(corpus, tmp_path / "file"), VOCABULARY, quiet)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0 must lie between 0 and 1"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0 must lie between 0 and 1"),
        ({"max_bytes": -1}, "data.max_bytes=-1 is negative"),
        ({"max_bytes": 3}, "has no text within data.max_bytes=3"),
        ({"shard_tokens": 0}, "data.shard_tokens=0 must be at least 1"),
    ],
)
def test_impossible_keys_are_bad_input_and_nothing_is_written(
    corpus: Path, tmp_path: Path, keys: dict[str, float], sentence: str
) -> None:
    data = DataConfig(**{"corpus": str(corpus), "directory": str(tmp_path / "out"), **keys})
    with pytest.raises(BadInput) as raised:
        prepare(data, VOCABULARY, quiet)
    assert sentence in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_of_two_documents_has_one_in_each_split(tmp_path: Path) -> None:
    """However small the fraction: a run without validation tokens could not be judged."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("one document")
    with pytest.raises(BadInput, match=r"is a single document"):
        prepare(config(folder, tmp_path / "out"), VOCABULARY, quiet)
    (folder / "b.txt").write_text("another document")
    for fraction in (1e-9, 0.5, 0.999999999):
        data = DataConfig(
            corpus=str(folder),
            directory=str(tmp_path / str(fraction)),
            validation_fraction=fraction,
        )
        manifest = prepare(data, VOCABULARY, quiet)
        assert manifest.train_tokens > 0
        assert manifest.validation_tokens > 0


def test_the_default_folder_is_named_after_data_and_tokenizer() -> None:
    assert directory_of(DataConfig(name="books"), VOCABULARY) == Path("prepared/books-small")
    assert directory_of(DataConfig(name="books", directory="/x"), VOCABULARY) == Path("/x")


# What dies and what refuses -----------------------------------------------------------------------


@contextlib.contextmanager
def preparing(corpus: Path, directory: Path) -> Iterator[tuple[Forked, IO[str]]]:
    """A process that prepares the corpus, and its output."""
    reading, writing = os.pipe()
    with open(reading) as output:
        with open(writing, "w") as stdout:
            process = forked.server().start(
                ["-m", "tests.data.preparing", str(corpus), str(directory)],
                env=os.environ,
                stdout=stdout,
                stderr=stdout,
            )
        try:
            yield process, output
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "moment", ["reading the corpus", "training the tokenizer", "first shard", "a unigram model"]
)
def test_a_killed_prepare_leaves_nothing_half_valid(
    corpus: Path, tmp_path: Path, moment: str
) -> None:
    directory = tmp_path / "out"
    with preparing(corpus, directory) as (process, output):
        if moment == "first shard":
            deadline = time.monotonic() + 60
            while not (tmp_path / "out.partial" / "train-00000.bin").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None or directory.exists()
                if directory.exists():
                    break
        else:
            assert any(moment in line for line in output)
    if directory.exists():  # the kill came after the rename: then all must be there
        open_split(directory, "train", verify=True)
        open_split(directory, "validation", verify=True)
    data = DataConfig(
        corpus=str(corpus), directory=str(directory), validation_fraction=0.2, shard_tokens=400
    )
    manifest = prepare(data, VOCABULARY, quiet)
    assert DatasetManifest.read(directory) == manifest
    open_split(directory, "train", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_crashed_prepare_left_does_not_get_into_the_data(
    corpus: Path, tmp_path: Path
) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    for name in ("train-00099.bin", "validation-100000.bin", "tokenizer.json", "dataset.json"):
        (left / name).write_text("old")
    manifest = prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    expected = {"dataset.json", "tokenizer.json", *(shard.path for shard in manifest.shards)}
    expected |= {"documents.json", "documents.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


@pytest.mark.parametrize(
    "name", ["thesis.tex", "train-00000.bin/deep", "train-1.bin", "train-00000.bin.txt"]
)
def test_a_folder_of_the_user_s_beside_the_data_is_left_alone(
    corpus: Path, tmp_path: Path, name: str
) -> None:
    theirs = tmp_path / "out.partial" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("dear")
    (tmp_path / "out.partial" / "train-00001.bin").write_text("dear")
    with pytest.raises(
        BadInput,
        match=rf"out.partial, where .* holds {re.escape(Path(name).parts[0])}, which .*; "
        "move that folder",
    ):
        prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    assert (
        theirs.read_text() == (tmp_path / "out.partial" / "train-00001.bin").read_text() == "dear"
    )
    assert not (tmp_path / "out").exists()


def test_a_link_of_the_user_s_beside_the_data_is_not_followed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "theirs")
    with pytest.raises(BadInput, match=r"data.directory=.* cannot be used"):
        prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    assert (tmp_path / "out.partial").is_symlink()
    assert (tmp_path / "theirs").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_as_the_folder_is_filled_where_it_leads(
    corpus: Path, tmp_path: Path, there: bool
) -> None:
    if there:
        (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far")
    manifest = prepare(config(corpus, tmp_path / "out"), VOCABULARY, quiet)
    assert (tmp_path / "out").is_symlink()
    assert DatasetManifest.read(tmp_path / "far") == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "out"]


def test_a_folder_that_no_rename_can_fill_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.chdir(tmp_path / "empty")
    for directory, why in (
        (".", "is the folder you are in"),
        (str(tmp_path / "circle"), "is a link that leads round"),
    ):
        with pytest.raises(BadInput, match=rf"data.directory={re.escape(directory)} {why}"):
            prepare(config(tmp_path / "no corpus", Path(directory)), VOCABULARY, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "empty"]


@pytest.mark.parametrize("arguments", [("-t", "tmpfs", "tmpfs"), ("--bind", "another")])
def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    folder = tmp_path / "a disk"
    folder.mkdir()
    (tmp_path / "another").mkdir()
    if os.geteuid() != 0 or not mounted(
        *arguments[:-1], str(tmp_path / arguments[-1]), str(folder)
    ):
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(
            BadInput, match=r"data.directory=.* is a mount point, .*; give a folder below it"
        ):
            prepare(config(tmp_path / "no corpus", folder), VOCABULARY, quiet)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_two_at_once_prepare_one_dataset(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    with (
        preparing(corpus, directory) as (one, its),
        preparing(corpus, directory) as (other, others),
    ):
        outputs = [its.read(), others.read()]
        assert [process.wait(timeout=90) for process in (one, other)] == [0, 0], outputs
    open_split(tmp_path / "out", "train", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def mounted(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)):
        pytest.skip("mounting a tmpfs of 1 MB needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "sealed"
    folder.mkdir()
    # As root no mode makes a folder unwritable, a read-only mount does.
    if os.geteuid() != 0 or not mounted("--bind", str(folder), str(folder)):
        pytest.skip("a read-only bind mount needs root")
    assert mounted("-o", "remount,ro,bind", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_gives_the_space_back(
    tmp_path: Path, small_disk: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_bytes(bytes(97 + byte % 26 for byte in os.urandom(60_000)))
    with pytest.raises(BadInput) as raised:
        prepare(config(corpus, small_disk / "out"), VOCABULARY, quiet)
    assert re.fullmatch(
        r"data.directory=.*: no space left while writing .*bin; free some .*", str(raised.value)
    )
    assert list(small_disk.iterdir()) == []


def test_an_unwritable_folder_is_one_sentence(corpus: Path, read_only: Path) -> None:
    with pytest.raises(
        BadInput, match=r"data.directory=.* cannot be written \(Read-only file system: .*\); name a"
    ):
        prepare(config(corpus, read_only / "deep" / "out"), VOCABULARY, quiet)


def test_a_folder_below_a_file_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"data.directory=.* cannot be used"):
        prepare(config(corpus, tmp_path / "file" / "out"), VOCABULARY, quiet)
