"""Where each training document begins in the token stream, and where it came from: an index beside
the shards.

Two files: `documents.json` names the corpus's files; `documents.bin` has a record a document, in
the order of the stream, little-endian: first token (8 bytes), number of the file (4), its line
there (4; 0: the whole file). It decides nothing of the training. A folder that was prepared before
there were indexes has none, and everything else of it works. Standard library only.
"""

import bisect
import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opt_train.protocol.exits import BadInput

SOURCES_FILE = "documents.json"
RECORDS_FILE = "documents.bin"
# Fixed width, so that the record of a number is found without reading others.
_RECORD = struct.Struct("<QII")
_WRITE_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """Where a document came from."""

    file: str
    line: int = 0
    """From 1; 0: the document is the whole file."""

    def __str__(self) -> str:
        return f"{self.file} line {self.line:,}" if self.line else self.file


class Documents(Protocol):
    """The documents of a token stream, numbered from 0 in its order."""

    def __len__(self) -> int: ...
    def start(self, document: int) -> int:
        """Its first token; of the number behind the last one, where the stream ends."""

    def source(self, document: int) -> DocumentSource | None:
        """Where it came from; None: that is not on record."""


class IndexWriter:
    """Writes the index of a stream while its tokens are written."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(files)}
        # Absolute: whoever asks in a year is not where this process is.
        names = [os.path.abspath(name) for name in files]
        with (folder / SOURCES_FILE).open("w", encoding="utf-8") as file:
            json.dump({"files": names}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        self._file = (folder / RECORDS_FILE).open("wb", buffering=_WRITE_AT_ONCE)

    def add(self, first_token: int, file: str, line: int) -> None:
        """The next document begins at `first_token`, and is `line` of `file`."""
        self._file.write(_RECORD.pack(first_token, self._numbers[file], line))

    def finish(self) -> None:
        """Make the records durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class DocumentIndex:
    """The index of a prepared folder, mapped: a document is found without reading the others."""

    def __init__(self, records: mmap.mmap, files: Sequence[str], tokens: int) -> None:
        self._records, self._files, self._tokens = records, files, tokens

    @classmethod
    def read(cls, folder: Path, tokens: int) -> "DocumentIndex | None":
        """The index in `folder`, of a training stream of `tokens`; None: there is none.

        Raises:
            BadInput: it cannot be read, or is of other tokens.
        """
        path = folder / RECORDS_FILE
        try:
            files = json.loads((folder / SOURCES_FILE).read_text())["files"]
            with path.open("rb") as file:
                records = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            mend = f"remove it and {SOURCES_FILE}"
            raise BadInput(f"{path} cannot be read ({error}); {mend}") from None
        index = cls(records, files, tokens)
        last = len(index) - 1
        # Not every record: of 10^8 documents they are gigabytes, and two of them show other tokens.
        whole = len(records) % _RECORD.size == 0
        if not whole or index.start(0) != 0 or not index.start(last) < tokens:
            raise BadInput(f"{path} is of other tokens; remove it and {SOURCES_FILE}")
        return index

    def __len__(self) -> int:
        return len(self._records) // _RECORD.size

    def start(self, document: int) -> int:
        return self._record(document)[0] if document < len(self) else self._tokens

    def source(self, document: int) -> DocumentSource | None:
        _, file, line = self._record(document)
        return DocumentSource(self._files[file], line) if file < len(self._files) else None

    def _record(self, document: int) -> tuple[int, int, int]:
        first, file, line = _RECORD.unpack_from(self._records, document * _RECORD.size)
        return first, file, line


def document_at(documents: Documents, token: int) -> int:
    """The number of the document that has `token`, the `</s>` behind it included."""
    return bisect.bisect_right(range(len(documents)), token, key=documents.start) - 1
