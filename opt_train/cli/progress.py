"""How far long work has come, on stderr, so that what a program reads on stdout stays clean."""

import sys
import time
from collections.abc import Callable, Sequence

ReportProgress = Callable[[int, int], None]
"""Called with (done, in all) after each piece of long work."""

COUNT_SECONDS = 5.0
BYTES_SECONDS = 2.0
TERMINAL_PART = 0.1
"""Of `BYTES_SECONDS`, on a terminal: a line that is written over may move."""


def announce(sentence: str) -> None:
    """A sentence about what is being done."""
    print(sentence, file=sys.stderr, flush=True)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of rows whose cells stand below one another; the last two, which are sentences, follow
    as they are."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 2)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), *row[-2:]]
        ).rstrip()
        for row in rows
    ]


def report_count(what: str, unit: str) -> ReportProgress:
    """A line every few seconds: `what`, and how many of its units are done."""
    reported = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= COUNT_SECONDS:
            reported = time.monotonic()
            print(f"{what}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    return report


def report_bytes(what: str, total: int, size: Callable[[int], str]) -> ReportProgress:
    """How many of `total` bytes are done: in place on a terminal, else a line now and then.

    Args:
        size: writes a number of bytes for a person.
    """
    reported, in_place = time.monotonic(), sys.stderr.isatty()
    pause = BYTES_SECONDS * TERMINAL_PART if in_place else BYTES_SECONDS

    def report(done: int, _: int) -> None:
        nonlocal reported
        ended = done >= total
        if time.monotonic() - reported < pause and not (in_place and ended):
            return
        reported = time.monotonic()
        line = f"{what}: {size(done)} of {size(total)} ({done / total:.0%})"
        if in_place:
            print(f"\r{line:60}", end="\n" if ended else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return report
