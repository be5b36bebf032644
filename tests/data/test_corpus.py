"""The corpus: which documents, in which order, and one sentence for everything that can be wrong
with it."""

import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_train.data.config import DataConfig
from opt_train.data.corpus import is_held_out, open_corpus
from opt_train.protocol.exits import BadInput


def documents(corpus: str, max_bytes: int = 0) -> list[str]:
    return list(open_corpus(DataConfig(corpus=corpus, max_bytes=max_bytes)).documents())


def test_a_folder_s_files_are_documents_in_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("second")
    (tmp_path / "a.txt").write_text("first\r\nline")
    (tmp_path / "c.py").write_text("third")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    # Every byte of a document counts: line ends are not translated.
    (tmp_path / "a.txt").write_bytes(b"first\r\nline")
    assert documents(str(tmp_path)) == ["first\r\nline", "second", "third"]


def test_a_name_full_of_glob_characters_is_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "we[i]rd *"
    folder.mkdir()
    (folder / "a.txt").write_text("found")
    assert documents(str(folder)) == ["found"]
    assert documents(str(folder / "a.txt")) == ["found"]


def test_a_glob_takes_what_it_matches(tmp_path: Path) -> None:
    for name in ("x1.txt", "x2.txt", "y.txt", "x3.pdf"):
        (tmp_path / name).write_text(name)
    assert documents(f"{tmp_path}/x*") == ["x1.txt", "x2.txt"]


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    texts = ["one", "two\nlines", "line\u2028separator", "\ud83d\ude00"]
    rows = [
        json.dumps({"text": text, "other": [1]}, ensure_ascii=index == 3)
        for index, text in enumerate(texts[:3])
    ]
    rows.append('{"text": "\\ud83d\\ude00"}')
    (tmp_path / "a.jsonl").write_bytes("\n\n".join(rows).encode() + b"\n")
    assert documents(str(tmp_path / "a.jsonl")) == [
        "one",
        "two\nlines",
        "line\u2028separator",
        "\U0001f600",
    ]


@pytest.mark.parametrize(
    "line", ['{"text": 3}', '{"words": "x"}', "text", "[]", '{"text": "\\ud800"}', '{"text": "a"']
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(
        BadInput, match=r"a.jsonl line 2 is not a JSON object with a string under the key text"
    ):
        documents(str(tmp_path))


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(BadInput, match=r"a.txt is not UTF-8 \(byte 2\); convert it"):
        documents(str(tmp_path))
    with pytest.raises(BadInput, match=r"b.jsonl line 2 is not UTF-8; convert the file"):
        documents(str(tmp_path / "b.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_first_line_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    assert documents(str(tmp_path)) == ["one", "two"]


def test_lines_of_json_larger_than_memory_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("so that everything is imported")
    documents(str(tmp_path))
    path = tmp_path / "large.jsonl"
    path.write_text((json.dumps({"text": "word " * 1000}) + "\n") * 2000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in open_corpus(DataConfig(corpus=str(path))).documents())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 2000
    assert peak < path.stat().st_size / 4


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"data.corpus=.*nothing does not exist; name a file, folder or glob"
    ):
        documents(str(tmp_path / "nothing"))
    with pytest.raises(BadInput, match=r"holds no file of .txt"):
        documents(str(tmp_path))
    with pytest.raises(BadInput, match=r"\*.txt holds no file of .txt"):
        documents(f"{tmp_path}/*.txt")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(BadInput, match=r"ends in .pdf; name a file of .txt"):
        documents(str(tmp_path / "a.pdf"))


@pytest.fixture
def closed() -> Iterator[Path]:
    """A corpus with a folder that may not be listed, read by somebody whom modes bind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for deep in ("open", "closed"):
            (folder / deep / "below").mkdir(parents=True)
            (folder / deep / "below" / "a.txt").write_text(deep)
        user = os.geteuid()
        (folder / "closed").chmod(0o000)
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            (folder / "closed").chmod(0o755)


def test_a_folder_that_may_not_be_listed_is_named_and_not_left_out(closed: Path) -> None:
    with pytest.raises(
        BadInput, match=r"data.corpus=.* cannot be read \(Permission denied: .*/closed\); mend"
    ):
        open_corpus(DataConfig(corpus=str(closed)))
    assert len(open_corpus(DataConfig(corpus=str(closed / "open"))).files) == 1


def test_a_corpus_below_a_folder_that_may_not_be_entered_is_one_sentence(closed: Path) -> None:
    for below in ("below", "below/a.txt", "below/*"):
        with pytest.raises(
            BadInput, match=r"data.corpus=.* cannot be read \(Permission denied: .*/closed/below"
        ):
            open_corpus(DataConfig(corpus=str(closed / "closed" / below)))


def test_a_folder_of_the_standard_library_that_may_not_be_listed_is_named(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(closed)})
    with pytest.raises(
        BadInput, match=r"data.corpus=stdlib cannot be read \(Permission denied: .*/closed\)"
    ):
        open_corpus(DataConfig(corpus="stdlib"))


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        ("x" * 300, r"data.corpus=x+ cannot be read \(File name too long: x+\); mend"),
        (
            "~nobody-of-this-name/x",
            r"data.corpus=~nobody-of-this-name/x begins with the home folder of nobody known",
        ),
    ],
)
def test_an_impossible_name_is_one_sentence(corpus: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        open_corpus(DataConfig(corpus=corpus))


def test_files_are_the_ones_that_rglob_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another selection or order would change the fingerprint of every dataset."""
    for name in (
        "b/a.txt",
        "b.txt",
        "b-/c.md",
        ".hidden/d.py",
        "a/a/a.jsonl",
        "a/a.txt/inner.txt",
        "x.pdf",
    ):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "link.txt").symlink_to(tmp_path / "elsewhere" / "far.txt")
    (tmp_path / "corpus" / "dangling.txt").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "corpus")
    for corpus in (".", str(tmp_path / "corpus")):
        found = [
            path for path in Path(corpus).rglob("*") if path.is_file() and path.suffix != ".pdf"
        ]
        expected = tuple(sorted(found, key=lambda path: path.as_posix()))
        assert len(expected) == 7
        assert open_corpus(DataConfig(corpus=corpus)).files == expected


def test_max_bytes_is_an_upper_bound_in_bytes_not_characters(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("ä" * 5)
    assert len(documents(str(tmp_path), max_bytes=20)) == 2
    assert len(documents(str(tmp_path), max_bytes=19)) == 1
    assert len(documents(str(tmp_path), max_bytes=9)) == 0


def test_the_standard_library_is_megabytes_of_text_in_a_fixed_order() -> None:
    corpus = open_corpus(DataConfig(corpus="stdlib"))
    names = [path.name for path in corpus.files]
    assert "argparse.py" in names
    assert not any("site-packages" in path.parts or "test" in path.parts for path in corpus.files)
    texts = list(open_corpus(DataConfig(corpus="stdlib", max_bytes=3_000_000)).documents())
    assert 2_000_000 < sum(len(text.encode()) for text in texts) <= 3_000_000
    assert texts == list(open_corpus(DataConfig(corpus="stdlib", max_bytes=3_000_000)).documents())


def test_the_split_goes_by_the_text_alone() -> None:
    texts = [f"document {number}" for number in range(5000)]
    held_out = [text for text in texts if is_held_out(text, 0.1)]
    assert 400 < len(held_out) < 600
    assert held_out == [text for text in reversed(texts) if is_held_out(text, 0.1)][::-1]
    assert {text for text in texts if is_held_out(text, 0.05)} < set(held_out)


def test_reading_leaves_the_home_directory_and_the_network_alone(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "corpus"
    home.mkdir()
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    program = f"""
import socket
def refuse(*arguments, **named):
    raise AssertionError("the network was used")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from opt_train.data.config import DataConfig
from opt_train.data.corpus import open_corpus
assert list(open_corpus(DataConfig(corpus={str(folder)!r})).documents()) == ["text"]
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {
        "HOME": str(home)
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert list(home.rglob("*")) == []
