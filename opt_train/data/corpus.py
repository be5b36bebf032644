"""Documents of a corpus, in one order on every machine, through Hugging Face `datasets` and without
a network."""

import glob
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opt_train.data.config import DataConfig
from opt_train.protocol.exits import BadInput

TEXT_SUFFIXES = (".txt", ".py", ".md")
LINES_SUFFIX = ".jsonl"

NOT_IN_THE_STANDARD_LIBRARY = frozenset(
    # Installed packages; and the library's own tests, which distributions split off: without them
    # every machine with the same Python reads the same documents.
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    text: str
    file: str
    """A path of `Corpus.file_names`."""
    line: int
    """Of that file, from 1; 0: all of it."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files a corpus consists of, in reading order, and how much of them to take."""

    key: str
    """Where the user wrote `name`, for messages."""
    name: str
    """What the user wrote."""
    files: tuple[Path, ...]
    skip_undecodable: bool
    """A file that is not UTF-8 is left out (the standard library has some on purpose) instead of
    being an error."""
    max_bytes: int
    """0: everything."""

    def __str__(self) -> str:
        return f"{self.key}={self.name}"

    @property
    def file_names(self) -> list[str]:
        """Of `files`, as documents name theirs."""
        return [_as_text(str(path)) for path in self.files]

    def documents(self) -> Iterator[str]:
        """Every document's text that is not blank, the same ones in the same order each time.

        Raises:
            BadInput: a file cannot be read, is not UTF-8, or a line of JSON has no text.
        """
        return (document.text for document in self.documents_with_sources())

    def documents_with_sources(self) -> Iterator[Document]:
        """The same documents, and where each stands.

        Raises:
            BadInput: as `documents`.
        """
        taken = 0
        for document in self._stream():
            taken += len(document.text.encode())
            # Stop at the first that does not fit: what is taken is a beginning of the corpus, and a
            # larger limit only adds to it.
            if self.max_bytes and taken > self.max_bytes:
                return
            yield document

    def _stream(self) -> Iterator[Document]:
        # Set before the first import: nothing here may wait for a network that a compute node does
        # not have.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        # Imported here because it takes two seconds, which only preparing should pay. It ships no
        # types.
        import datasets  # type: ignore[import-untyped]  # noqa: PLC0415

        arguments = {
            "key": self.key,
            "files": [str(path) for path in self.files],
            "skip_undecodable": self.skip_undecodable,
        }
        with tempfile.TemporaryDirectory(prefix="opt-train-corpus-") as cache:
            # The builder puts a lock file into its cache even when it streams; the user's home is
            # not ours to litter.
            before = datasets.config.HF_DATASETS_CACHE
            datasets.config.HF_DATASETS_CACHE = Path(cache)
            try:
                # large_string has 64-bit offsets: a batch of `string` ends at 2 GB.
                rows = datasets.IterableDataset.from_generator(
                    _rows,
                    gen_kwargs=arguments,
                    features=datasets.Features(
                        {
                            "text": datasets.Value("large_string"),
                            "file": datasets.Value("string"),
                            "line": datasets.Value("int64"),
                        }
                    ),
                )
            finally:
                datasets.config.HF_DATASETS_CACHE = before
            for row in rows:
                yield Document(**row)


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data.corpus` names.

    Raises:
        BadInput: there is no such file, folder or match, or none of it is of a kind that can be
            read.
    """
    return _open("data.corpus", data.corpus, data.max_bytes)


def open_named_set(name: str, corpus: str) -> Corpus:
    """The corpus of the named set `name` of `data.validation_sets`, all of it.

    Raises:
        BadInput: as `open_corpus`.
    """
    return _open(f"data.validation_sets: {name}", corpus, max_bytes=0)


def _open(key: str, corpus: str, max_bytes: int) -> Corpus:
    is_library = corpus == "stdlib"
    files = _standard_library(key) if is_library else _files(key, corpus)
    return Corpus(
        key=key, name=corpus, files=files, skip_undecodable=is_library, max_bytes=max_bytes
    )


def digest_of(text: str) -> bytes:
    """What a document is known by: sha256 of its text."""
    return hashlib.sha256(text.encode()).digest()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a property of its text alone, so copies never
    straddle the split."""
    return position_in_split(text) < fraction


def position_in_split(text: str) -> float:
    """A uniform number in [0, 1) that the text alone decides."""
    # 48 bits: a float holds them exactly.
    return int.from_bytes(digest_of(text)[:6], "big") / 2**48


def _rows(key: str, files: list[str], skip_undecodable: bool) -> Iterator[dict[str, str | int]]:
    # By its name, not its number: the library calls this once a file, each time with a list of one.
    for name in files:
        path = Path(name)
        try:
            for line, text in _texts_in(key, path):
                if text.strip():
                    yield {"text": text, "file": _as_text(name), "line": line}
        except UnicodeDecodeError as error:
            if skip_undecodable:
                continue
            raise BadInput(
                f"{key}: {path} is not UTF-8 (byte {error.start}); convert it or leave it out of "
                "the corpus"
            ) from None
        except OSError as error:
            raise BadInput(
                f"{key}: {path} cannot be read ({error.strerror}); mend it or leave it out"
            ) from None


def _as_text(name: str) -> str:
    """`name`, whose bytes need not be UTF-8, as text that can be written down."""
    return name.encode("utf-8", "backslashreplace").decode()


def _texts_in(key: str, path: Path) -> Iterable[tuple[int, str]]:
    """The documents of one file: its lines by number, or, as 0, all of it."""
    if path.suffix == LINES_SUFFIX:
        return _lines(key, path)
    return [(0, path.read_bytes().decode("utf-8"))]


def _lines(key: str, path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a file of JSON Lines, of which one at a time is in memory:
    such a file may be larger."""
    # As bytes: only \n ends a line. Text mode would end one at a \r too, and `splitlines` at a
    # U+2028, which JSON allows inside a string.
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            try:
                # What some editors put in front of a file is no part of its first line.
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise BadInput(
                    f"{key}: {path} line {number} is not UTF-8; convert the file or leave it out "
                    "of the corpus"
                ) from None
            if not line.strip():
                continue
            try:
                text: str = json.loads(line)["text"]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise BadInput(
                    f"{key}: {path} line {number} is not a JSON object with a string under the "
                    "key text; "
                    "mend or remove the line"
                ) from None
            yield number, text


def _standard_library(key: str) -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    try:
        below = _below(root, leave_out=NOT_IN_THE_STANDARD_LIBRARY)
        files = [path for path in below if path.name.endswith(".py") and path.is_file()]
    except OSError as error:
        raise _refused(key, "stdlib", error) from None
    if not files:
        raise BadInput(
            f"{key}=stdlib found no .py files in {root}; install Python's library sources or name "
            "another corpus"
        )
    # By the path below the library: neither where Python is installed nor the order in which a file
    # system lists names may decide the order of training.
    return tuple(sorted(files, key=lambda path: path.relative_to(root).as_posix()))


def _files(key: str, corpus: str) -> tuple[Path, ...]:
    try:
        return _files_at(key, corpus, Path(corpus).expanduser())
    except OSError as error:
        raise _refused(key, corpus, error) from None
    except RuntimeError:  # expanduser's
        raise BadInput(
            f"{key}={corpus} begins with the home folder of nobody known here; write the folder out"
        ) from None


def _files_at(key: str, corpus: str, path: Path) -> tuple[Path, ...]:
    kinds = ", ".join((*TEXT_SUFFIXES, LINES_SUFFIX))
    if path.is_file():
        if path.suffix not in (*TEXT_SUFFIXES, LINES_SUFFIX):
            raise BadInput(
                f"{key}={corpus} ends in {path.suffix or 'nothing'}; name a file of {kinds}"
            )
        return (path,)
    if path.is_dir():
        found = list(_below(path))
    elif glob.has_magic(corpus):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    else:
        raise BadInput(
            f"{key}={corpus} does not exist; name a file, folder or glob of {kinds}, or use "
            f"{key}=stdlib"
        )
    files = [
        item for item in found if item.suffix in (*TEXT_SUFFIXES, LINES_SUFFIX) and item.is_file()
    ]
    if not files:
        raise BadInput(
            f"{key}={corpus} holds no file of {kinds}; add documents or name another corpus"
        )
    return tuple(sorted(files, key=lambda item: item.as_posix()))


def _below(root: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All that is no folder below `root`, outside folders of the names in `leave_out`; links are
    not entered.

    Raises:
        OSError: a folder cannot be listed. `Path.rglob` would go on without its documents.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in leave_out]
        yield from (Path(folder, name) for name in names)


def _refused(key: str, corpus: str, error: OSError) -> BadInput:
    where = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    return BadInput(
        f"{key}={corpus} cannot be read ({where}); mend its permissions or name another corpus"
    )
