"""Named validation sets: never trained on, added without touching what is there, and no set in
another's place."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_train.data import tokenizer as bpe
from opt_train.data.batches import ValidationSet
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.corpus import is_held_out
from opt_train.data.manifest import DATASET_FILE, DatasetManifest, NamedSet
from opt_train.data.named_sets import named_sets
from opt_train.data.prepare import prepare
from opt_train.data.prepared import check_prepared_by
from opt_train.data.staging_folder import StagingFolder
from opt_train.data.token_stream import open_split
from opt_train.data.verify import verify_dataset
from opt_train.protocol.exits import BadInput

VOCABULARY = TokenizerConfig(name="small", vocab_size=300)
FRACTION = 0.2
DOCUMENTS = {
    f"{number:03d}.txt": f"document {number}: " + "some words of it " * (number + 1)
    for number in range(40)
}
TRAINED = [name for name, text in DOCUMENTS.items() if not is_held_out(text, FRACTION)]
HELD = [name for name, text in DOCUMENTS.items() if is_held_out(text, FRACTION)]


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus", DOCUMENTS)


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """A set that shares no document with the corpus."""
    return write(tmp_path / "web", {f"{n}.txt": f"page {n} of another kind " * 9 for n in range(5)})


def config(corpus: Path, directory: Path, sets: str = "", **keys: object) -> DataConfig:
    keys = {"validation_fraction": FRACTION, "sequence_length": 16, **keys}
    return DataConfig(
        name="tiny", corpus=str(corpus), directory=str(directory), validation_sets=sets, **keys
    )


def made(data: DataConfig) -> tuple[DatasetManifest, list[str]]:
    told: list[str] = []
    return prepare(data, VOCABULARY, told.append), told


def tokens_of(directory: Path, split: str) -> list[int]:
    stream = open_split(directory, split, verify=True)
    return stream.read(0, len(stream)).tolist()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# With the corpus ----------------------------------------------------------------------------------


def test_a_document_of_a_set_is_trained_on_by_nobody(corpus: Path, tmp_path: Path) -> None:
    """Neither by the model nor by the tokenizer: all is as if the corpus had never had it."""
    shared = {name: DOCUMENTS[name] for name in (*TRAINED[:3], *HELD[:2])}
    write(tmp_path / "shared", {**shared, "more.txt": "a text of its own " * 9})
    manifest, told = made(config(corpus, tmp_path / "out", f"shared={tmp_path / 'shared'}"))
    assert any("left 3 of them out of training: the validation set shared" in line for line in told)
    without = write(
        tmp_path / "without", {k: v for k, v in DOCUMENTS.items() if k not in TRAINED[:3]}
    )
    expected, _ = made(config(without, tmp_path / "expected"))
    assert manifest.fingerprint == expected.fingerprint
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "expected/tokenizer.json"
    ).read_bytes()
    assert tokens_of(tmp_path / "out", "train") == tokens_of(tmp_path / "expected", "train")
    assert (manifest.documents, expected.documents) == (37, 37)
    [named] = manifest.sets
    assert (named.name, named.documents, named.left_out) == ("shared", 6, 3)


def test_the_tokens_of_a_set_are_its_documents_in_order(
    corpus: Path, web: Path, tmp_path: Path
) -> None:
    pages = tmp_path / "pages.jsonl"
    pages.write_text(
        "".join(json.dumps({"text": f"</s> line {number} " * 7}) + "\n" for number in range(9))
    )
    manifest, _ = made(
        config(corpus, tmp_path / "out", f"web={web},pages={pages}", shard_tokens=50)
    )
    tokenizer = bpe.load(tmp_path / "out" / "tokenizer.json")
    texts = {
        "web": [path.read_text() for path in sorted(web.iterdir())],
        "pages": [f"</s> line {number} " * 7 for number in range(9)],
    }
    for name, documents in texts.items():
        expected = [token for text in documents for token in (*tokenizer.encode(text).ids, bpe.EOS)]
        assert tokens_of(tmp_path / "out", name) == expected
        assert manifest.splits[name] == len(expected)
        assert len(manifest.shards_of(name)) == -(-len(expected) // 50)
    assert [named.name for named in manifest.sets] == ["web", "pages"]


def test_a_set_changes_no_training(corpus: Path, web: Path, tmp_path: Path) -> None:
    """Or a run that goes on with one more set would be refused as trained on other data."""
    plain, _ = made(config(corpus, tmp_path / "plain"))
    held = write(tmp_path / "held", {name: DOCUMENTS[name] for name in HELD})
    measured, told = made(config(corpus, tmp_path / "measured", f"web={web},held={held}"))
    assert measured.fingerprint == plain.fingerprint
    assert not any("out of training" in line for line in told)
    assert measured.shards_of("train") == plain.shards_of("train")


def test_a_corpus_of_nothing_but_a_set_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"data.corpus=.* has no two documents outside data.validation_sets"
    ):
        made(config(corpus, tmp_path / "out", f"all={corpus}"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("later", [False, True])
def test_a_set_without_a_whole_sequence_is_refused_before_a_run(
    corpus: Path, tmp_path: Path, later: bool
) -> None:
    (tmp_path / "short.txt").write_text("x")
    if later:
        made(config(corpus, tmp_path / "out"))
    sets = f"short={tmp_path / 'short.txt'}"
    with pytest.raises(
        BadInput,
        match=r"short has 2 tokens, and one sequence of data.sequence_length=16 takes 17; add",
    ):
        made(config(corpus, tmp_path / "out", sets))
    assert (tmp_path / "out").exists() == later
    data = config(corpus, tmp_path / "out", sets, sequence_length=1)
    manifest, _ = made(data)
    with pytest.raises(BadInput, match="short has 2 tokens"):
        check_prepared_by(
            manifest, config(corpus, tmp_path / "out", sets), VOCABULARY, tmp_path / "out"
        )


# Added later --------------------------------------------------------------------------------------


def test_a_set_added_later_is_the_same_and_nothing_else_changes(
    corpus: Path, web: Path, tmp_path: Path
) -> None:
    first, _ = made(config(corpus, tmp_path / "out"))
    before = content(tmp_path / "out")
    shutil.rmtree(corpus)  # what was trained on is known without it
    added, told = made(config(corpus, tmp_path / "out", f"web={web}"))
    write(corpus, DOCUMENTS)
    at_once, _ = made(config(corpus, tmp_path / "at-once", f"web={web}"))
    assert tokens_of(tmp_path / "out", "web") == tokens_of(tmp_path / "at-once", "web")
    assert (added.fingerprint, added.sets) == (first.fingerprint, at_once.sets)
    after = content(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == {
        DATASET_FILE,
        "set-web-00000.bin",
    }
    assert any("added the validation set web" in line for line in told)
    verify_dataset(tmp_path / "out")
    assert made(config(corpus, tmp_path / "out", f"web={web}")) == (added, [])
    assert made(config(corpus, tmp_path / "out")) == (added, []), (
        "who does not name it, does not mind it"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-once", "corpus", "out", "web"]


@pytest.mark.parametrize("shard_tokens", [7, 1 << 20])
def test_a_set_that_was_trained_on_already_is_refused(
    corpus: Path, tmp_path: Path, shard_tokens: int
) -> None:
    """Its perplexity would praise what was learnt by heart."""
    made(config(corpus, tmp_path / "out", shard_tokens=shard_tokens))
    before = content(tmp_path / "out")
    bad = write(tmp_path / "bad", {name: DOCUMENTS[name] for name in (*TRAINED[:2], *HELD[:2])})
    shutil.rmtree(corpus)
    with pytest.raises(BadInput) as raised:
        made(config(corpus, tmp_path / "out", f"bad={bad}"))
    assert (
        f"data.validation_sets: bad={bad} holds 2 documents that {tmp_path / 'out'} has among its"
        in str(raised.value)
    )
    assert content(tmp_path / "out") == before
    for name in TRAINED[:2]:
        (bad / name).unlink()
    manifest, _ = made(config(corpus, tmp_path / "out", f"bad={bad}"))
    assert manifest.sets[0].documents == 2


@pytest.mark.parametrize("moved", [0, 1, -1])
def test_a_crash_while_adding_leaves_a_folder_that_can_be_used(
    corpus: Path, web: Path, tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = made(config(corpus, tmp_path / "out"))
    whole = StagingFolder.move_into

    def crash(self: StagingFolder, directory: Path, names: list[str]) -> None:
        whole(self, directory, names[:moved])
        raise KeyboardInterrupt

    data = config(corpus, tmp_path / "out", f"web={web}", shard_tokens=90)
    with monkeypatch.context() as patch:
        patch.setattr(StagingFolder, "move_into", crash)
        with pytest.raises(KeyboardInterrupt):
            made(data)
    assert DatasetManifest.read(tmp_path / "out") == first
    verify_dataset(tmp_path / "out")
    manifest, _ = made(data)
    assert len(manifest.shards_of("web")) > 2
    verify_dataset(tmp_path / "out")


def test_two_that_add_a_set_at_once_add_one(corpus: Path, web: Path, tmp_path: Path) -> None:
    made(config(corpus, tmp_path / "out"))
    program = (
        "import sys; from opt_train.data.config import *; from opt_train.data.prepare import "
        "prepare\n"
        "data = DataConfig(corpus=sys.argv[1], directory=sys.argv[2], validation_fraction=0.2, "
        "sequence_length=16,\n"
        "                  validation_sets=sys.argv[3])\n"
        "prepare(data, TokenizerConfig(name='small', vocab_size=300), print)"
    )
    words = [sys.executable, "-c", program, str(corpus), str(tmp_path / "out"), f"web={web}"]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [named.name for named in DatasetManifest.read(tmp_path / "out").sets] == ["web"]
    verify_dataset(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "web"]


# Which configuration ------------------------------------------------------------------------------


def test_another_text_under_the_same_name_is_refused(
    corpus: Path, web: Path, tmp_path: Path
) -> None:
    """Two texts in one curve."""
    manifest, _ = made(config(corpus, tmp_path / "out", f"web={web}"))
    other = config(corpus, tmp_path / "out", f"web={web / '0.txt'}")
    for refuse in (
        lambda: made(other),
        lambda: check_prepared_by(manifest, other, VOCABULARY, tmp_path / "out"),
    ):
        with pytest.raises(
            BadInput, match=r"web was made of .* and is .*0.txt now; give that one another name"
        ):
            refuse()


def test_a_set_that_took_documents_out_of_training_stays_named(
    corpus: Path, web: Path, tmp_path: Path
) -> None:
    """Without it the same configuration would mean two different trainings, by who prepared the
    folder first."""
    shared = write(tmp_path / "shared", {name: DOCUMENTS[name] for name in TRAINED[-1:]})
    manifest, _ = made(config(corpus, tmp_path / "out", f"shared={shared},web={web}"))
    check_prepared_by(
        manifest, config(corpus, tmp_path / "out", f"shared={shared}"), VOCABULARY, tmp_path / "out"
    )
    for sets in ("", f"web={web}"):
        with pytest.raises(BadInput) as raised:
            made(config(corpus, tmp_path / "out", sets))
        sentence = str(raised.value)
        assert "was prepared without 1 document of the corpus that the set shared holds" in sentence
        assert f"keep shared={shared} in data.validation_sets" in sentence


def test_a_run_whose_data_lacks_a_set_is_told_how_to_add_it(
    corpus: Path, web: Path, tmp_path: Path
) -> None:
    manifest, _ = made(config(corpus, tmp_path / "out"))
    with pytest.raises(
        BadInput,
        match=r"out lacks the validation set web; `opt-train prepare` with the same keys adds",
    ):
        check_prepared_by(
            manifest, config(corpus, tmp_path / "out", f"web={web}"), VOCABULARY, tmp_path / "out"
        )
    with pytest.raises(
        BadInput,
        match=r"out holds no validation set 'web'; name it in data.validation_sets and run",
    ):
        open_split(tmp_path / "out", "web", verify=False)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (
            "web",
            "'web' is not name=corpus; write a name and a file, folder or glob without commas, as "
            "web=texts/web",
        ),
        ("web=", "'web=' is not name=corpus"),
        ("web=a,,b=c", "'' is not name=corpus"),
        ("web=a,b", "'b' is not name=corpus"),
        ("=a", "'' names no set; use small letters, digits, dashes and underscores, 40 at most"),
        ("Web=a", "'Web' names no set"),
        ("w.b=a", "'w.b' names no set"),
        ("../w=a", "'../w' names no set"),
        ("w" * 41 + "=a", "names no set"),
        ("validation=a", "validation is a part of the corpus itself; choose another name"),
        ("train=a", "train is a part of the corpus itself"),
        ("web=a,web=b", "names web twice; give each set a name of its own"),
    ],
)
def test_pairs_that_mean_nothing_are_one_sentence(written: str, sentence: str) -> None:
    with pytest.raises(BadInput) as raised:
        named_sets(DataConfig(validation_sets=written))
    assert str(raised.value).startswith("data.validation_sets")
    assert sentence in str(raised.value)


def test_pairs_are_read_in_the_order_written() -> None:
    assert list(
        named_sets(DataConfig(validation_sets=" web = texts/a=b , code-2_x=src ")).items()
    ) == [
        ("web", "texts/a=b"),
        ("code-2_x", "src"),
    ]
    assert named_sets(DataConfig(validation_sets=" ")) == {}


def test_a_mistake_in_a_set_names_the_set_and_not_the_corpus(corpus: Path, tmp_path: Path) -> None:
    data = config(corpus, tmp_path / "out", f"web={tmp_path / 'nowhere'}")
    with pytest.raises(
        BadInput, match=r"^data.validation_sets: web=.*nowhere does not exist; name a file"
    ):
        made(data)
    write(tmp_path / "nowhere", {"a.jsonl": '{"txt": "x"}'})
    with pytest.raises(
        BadInput, match=r"^data.validation_sets: web: .*a.jsonl line 1 is not a JSON object"
    ):
        made(data)
    (tmp_path / "nowhere" / "a.jsonl").write_text("\n")
    with pytest.raises(
        BadInput, match=r"^data.validation_sets: web=.*nowhere has no text; add documents or leave"
    ):
        made(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "nowhere"]


# The manifest -------------------------------------------------------------------------------------


def test_a_manifest_from_before_there_were_sets_still_reads(corpus: Path, tmp_path: Path) -> None:
    manifest, _ = made(config(corpus, tmp_path / "out"))
    payload = json.loads((tmp_path / "out" / DATASET_FILE).read_text())
    del payload["sets"]
    (tmp_path / "out" / DATASET_FILE).write_text(json.dumps(payload))
    assert DatasetManifest.read(tmp_path / "out") == manifest
    assert manifest.sets == ()


Payload = dict[str, Any]


def in_set(key: str, value: object) -> Callable[[Payload], object]:
    return lambda payload: payload["sets"][0].update({key: value})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda payload: payload.update(sets=3), "sets is not a list"),
        (lambda payload: payload.update(sets=["web"]), "'web' is not a JSON object"),
        (lambda payload: payload["sets"].append(payload["sets"][0]), "two sets have the same name"),
        (lambda payload: payload["sets"][0].pop("corpus"), "corpus is missing"),
        (in_set("tokens", "9"), "tokens is not a whole number"),
        (in_set("tokens", 9), "the web shards do not hold 9 tokens in all"),
        (in_set("name", "train"), "two sets have the same name"),
    ],
)
def test_a_damaged_set_is_damage(
    corpus: Path, web: Path, tmp_path: Path, damage: Callable[[Payload], object], why: str
) -> None:
    made(config(corpus, tmp_path / "out", f"web={web}"))
    payload = json.loads((tmp_path / "out" / DATASET_FILE).read_text())
    damage(payload)
    (tmp_path / "out" / DATASET_FILE).write_text(json.dumps(payload))
    with pytest.raises(BadInput) as raised:
        DatasetManifest.read(tmp_path / "out")
    assert f"dataset.json is damaged ({why}); delete the folder" in str(raised.value)


def test_a_changed_shard_of_a_set_is_found_before_a_run(
    corpus: Path, web: Path, tmp_path: Path
) -> None:
    made(config(corpus, tmp_path / "out", f"web={web}"))
    shard = tmp_path / "out" / "set-web-00000.bin"
    bytes_ = bytearray(shard.read_bytes())
    bytes_[4] ^= 1
    shard.write_bytes(bytes_)
    with pytest.raises(BadInput, match=r"set-web-00000.bin has a wrong checksum"):
        verify_dataset(tmp_path / "out")


@pytest.mark.parametrize("world", [1, 3, 7])
def test_a_set_of_fewer_sequences_than_ranks_is_read_once(
    corpus: Path, web: Path, tmp_path: Path, world: int
) -> None:
    made(config(corpus, tmp_path / "out", f"web={web}"))
    stream = open_split(tmp_path / "out", "web", verify=True)
    length = (len(stream) - 1) // 4
    validation = ValidationSet(stream, length, "web")
    rows = [
        batch.tokens[row].tolist()
        for rank in range(world)
        for batch in validation.share(data_rank=rank, data_world=world, micro_batch=8)
        for row in np.flatnonzero(batch.weights.numpy())
    ]
    assert rows == [stream.read(i * length, length).tolist() for i in range(4)]
    with pytest.raises(BadInput, match="the web split has"):
        ValidationSet(stream, len(stream), "web")


def test_what_a_crash_left_of_a_set_is_cleared(corpus: Path, web: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "set-old-00003.bin").write_text("old")
    manifest, _ = made(config(corpus, tmp_path / "out", f"web={web}"))
    assert set(os.listdir(tmp_path / "out")) == {
        DATASET_FILE,
        "tokenizer.json",
        "documents.json",
        "documents.bin",
        *(s.path for s in manifest.shards),
    }
    assert NamedSet("web", str(web), manifest.splits["web"], 5, 0) in manifest.sets
