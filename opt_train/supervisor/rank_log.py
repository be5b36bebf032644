"""The end of a rank's log as evidence: few lines, bounded in length, with their true numbers."""

import os
from pathlib import Path

from opt_train.protocol.facts import LogLine

TAIL_LINES = 20
MAX_LINE_BYTES = 600
_TAIL_BYTES = 64 * 1024
_BLOCK_BYTES = 1 << 20


def size_of(path: Path) -> int:
    """Bytes in the file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def tail(path: Path, run_directory: Path, after_byte: int = 0, lines: int = TAIL_LINES) -> tuple[LogLine, ...]:
    """The last non-empty `lines` of the log, as far as they begin at or after `after_byte`.

    Each is cut at `MAX_LINE_BYTES`; what is not UTF-8 is replaced. A log that cannot be read has no lines.
    """
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            begin = max(after_byte, end - _TAIL_BYTES)
            number = 1 + _newlines(file.fileno(), begin)
            content = os.pread(file.fileno(), end - begin, begin)
    except OSError:
        return ()
    name = _relative(path, run_directory)
    numbered = [
        LogLine(name, number + index, raw[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r"))
        for index, raw in enumerate(content.split(b"\n"))
        if raw.strip()
    ]
    if begin > after_byte and numbered and numbered[0].line == number:
        del numbered[0]  # the window begins in the middle of this line
    return tuple(numbered[-lines:])


def _newlines(descriptor: int, end: int) -> int:
    """Newlines in the file's first `end` bytes."""
    count = position = 0
    while position < end:
        block = os.pread(descriptor, min(_BLOCK_BYTES, end - position), position)
        if not block:
            break
        count += block.count(b"\n")
        position += len(block)
    return count


def _relative(path: Path, run_directory: Path) -> str:
    try:
        return str(path.resolve().relative_to(run_directory.resolve()))
    except ValueError:
        return str(path)
