"""The documents of a batch: named by their files, and shared out to the token."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from opt_train.data.batch_documents import documents_of
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.document_index import DocumentIndex, DocumentSource, document_at
from opt_train.data.prepare import prepare
from opt_train.data.scanned_documents import ScannedDocuments
from opt_train.data.token_stream import TokenStream, open_split
from opt_train.data.tokenizer import load
from opt_train.protocol.exits import BadInput

EOS = 2


@dataclass(frozen=True)
class Listed:
    """Documents of 10, 3 and 27 tokens."""

    starts: tuple[int, ...] = (0, 10, 13, 40)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def start(self, document: int) -> int:
        return self.starts[document]

    def source(self, document: int) -> DocumentSource | None:
        return DocumentSource("a.jsonl", document + 1)


def test_shares_are_counted_to_the_token() -> None:
    # Of 8 tokens each: sample 1 is tokens 8 to 16 (2, 3 and 3), sample 4 is 32 to 40 (8).
    shares = documents_of((4, 1), 8, Listed())
    assert [(s.document, s.ranges, s.tokens, s.share) for s in shares] == [
        (2, ((0, 3), (19, 27)), 11, 11 / 16),
        (1, ((0, 3),), 3, 3 / 16),
        (0, ((8, 10),), 2, 2 / 16),
    ]
    assert (shares[0].first_token, shares[0].document_tokens) == (13, 27)
    assert str(shares[0].source) == "a.jsonl line 3"


def test_a_document_has_the_end_mark_behind_it() -> None:
    assert [document_at(Listed(), token) for token in (0, 9, 10, 12, 13, 39)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("cuts", [(), (7,), (4, 5, 11)])
def test_documents_without_an_index_are_found_by_their_ends(cuts: tuple[int, ...]) -> None:
    tokens = np.array([5, 5, EOS, 6, EOS, 7, 7, 7, EOS, 8, 8, EOS], dtype=np.uint16)
    stream = TokenStream(list(np.split(tokens, cuts)))
    found = ScannedDocuments(stream, EOS, until=len(stream))
    assert [found.start(n) for n in range(len(found) + 1)] == [0, 3, 5, 9, 12]
    assert found.source(0) is None


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Whole files and files of lines, a blank line and an empty text among them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"whole file {number} " * (5 + number))
    lines = [json.dumps({"text": f"line {n} of many, not like others {n * n}"}) for n in range(30)]
    lines[3:3] = ["", json.dumps({"text": "  "})]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_each_training_document_is_where_the_index_says(texts: Path, tmp_path: Path) -> None:
    """Against the texts themselves, read again from the files that it names."""
    config = DataConfig(corpus=str(texts), directory=str(tmp_path / "out"), shard_tokens=100)
    manifest = prepare(config, TokenizerConfig(vocab_size=300), lambda line: None)
    stream = open_split(tmp_path / "out", "train", verify=True)
    index = DocumentIndex.read(tmp_path / "out", len(stream))
    assert index is not None
    scanned = ScannedDocuments(stream, manifest.eos, until=len(stream))
    assert len(index) == len(scanned)
    tokenizer = load(tmp_path / "out" / "tokenizer.json")
    for number in range(len(index)):
        start, end = index.start(number), index.start(number + 1)
        assert (start, end) == (scanned.start(number), scanned.start(number + 1))
        source = index.source(number)
        assert source is not None
        file = Path(source.file)
        assert file.is_absolute()
        text = file.read_text()
        if source.line:
            text = json.loads(text.splitlines()[source.line - 1])["text"]
        assert tokenizer.decode(stream.read(start, end - start - 1).tolist()) == text
        assert stream.read(end - 1, 1)[0] == manifest.eos


def test_a_folder_without_an_index_has_none_and_one_of_other_tokens_is_refused(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = DataConfig(corpus=str(texts), directory=str(out))
    manifest = prepare(config, TokenizerConfig(vocab_size=300), lambda line: None)
    with pytest.raises(BadInput, match=r"documents\.bin is of other tokens; remove it and"):
        DocumentIndex.read(out, 10)
    (out / "documents.bin").unlink()
    assert DocumentIndex.read(out, manifest.train_tokens) is None
    # What was prepared before there were indexes is prepared.
    assert prepare(config, TokenizerConfig(vocab_size=300), lambda line: None) == manifest
