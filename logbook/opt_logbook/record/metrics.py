"""One line a step: `metrics/<attempt>.jsonl`, written by whoever holds the journal
(docs/journal.md).

(attempt, step) is the key, so a line that comes twice is written once. Lines are not fsynced: a
crash may lose the newest.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from opt_logbook.record.attempt import AttemptId
from opt_logbook.record.codec import NON_FINITE, CodecError, parse, to_json_value
from opt_logbook.record.run_directory import RunDirectory

JOURNAL_HEAD = "journal_head"
"""Key of an attempt's first line: `seq hash` of the journal then, which finds a tail that was cut
off it later."""

_TAIL_BYTES = 1 << 16
"""More than the longest line, by far."""


@dataclass(frozen=True, slots=True)
class MetricsReading:
    """The metrics of a run."""

    lines: tuple[dict[str, Any], ...]
    """By attempt and step; of each key the line that was written first."""
    conflicts: tuple[tuple[str, int, int], ...]
    """(attempt, step, line number) of lines that contradict an earlier one of their key."""
    broken: tuple[tuple[str, int], ...]
    """(attempt, line number) of lines that cannot be read, a torn last one not counted."""
    torn: tuple[str, ...]
    """Attempts whose last line is torn."""


class MetricsWriter:
    """Appends to the metrics of a run. Keeps the newest attempt's file open."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._attempt = ""
        self._descriptor = -1
        self._steps: set[int] = set()
        self._lines = 0

    def append(self, attempt: str, line: Mapping[str, Any], journal_head: str = "") -> bool:
        """Write `line`, which must have a `step`; False where the attempt has one for this step
        already.

        `journal_head` (`str(journal.head)`) goes into the attempt's first line.

        Raises:
            OSError: the line could not be written; what was written of it is cut off again before
                the next.
        """
        if attempt != self._attempt:
            self._open(attempt)
        step = int(line["step"])
        if step in self._steps:
            return False
        anchor = {JOURNAL_HEAD: journal_head} if journal_head and not self._lines else {}
        # The rank may have got the head with its start; then its own counts.
        payload = {"attempt": attempt, **anchor, **to_json_value(line)}
        text = json.dumps(payload, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            # No fsync: at a line a step it would cost more than the gap that a crash leaves in a
            # curve. What somebody acts on is in the journal.
            written = os.write(self._descriptor, text)
            if written != len(text):
                raise OSError(28, f"no space for a line of {self._run.metrics_of(attempt)}")
        except OSError:
            self.close()
            raise
        self._steps.add(step)
        self._lines += 1
        return True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._attempt, self._descriptor = "", -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, attempt: str) -> None:
        AttemptId.parse(attempt)  # a name from a message becomes a path here
        self.close()
        path = self._run.metrics_of(attempt)
        self._run.make_folder(path.parent)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            # A torn line would run into the next one and spoil that too.
            os.ftruncate(self._descriptor, end)
        self._steps = set()
        for text in data[:end].splitlines():
            payload = _parse(text)
            if payload is not None:
                self._steps.add(payload["step"])
        self._lines = len(self._steps)
        self._attempt = attempt


def attempts_in(run: RunDirectory) -> list[str]:
    """The attempts that have a metrics file, in order."""
    if not run.metrics.is_dir():
        return []
    found: list[AttemptId] = []
    for path in run.metrics.glob("*.jsonl"):
        try:
            found.append(AttemptId.parse(path.stem))
        except ValueError:
            continue
    return [str(attempt) for attempt in sorted(found)]


def read(run: RunDirectory) -> MetricsReading:
    """Read all metrics of the run, without a lock and while they are being written."""
    lines: list[dict[str, Any]] = []
    conflicts: list[tuple[str, int, int]] = []
    broken: list[tuple[str, int]] = []
    torn: list[str] = []
    for attempt in attempts_in(run):
        data = run.metrics_of(attempt).read_bytes()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            torn.append(attempt)
        by_step: dict[int, dict[str, Any]] = {}
        for number, text in enumerate(data[:end].split(b"\n")[:-1], 1):
            payload = _parse(text)
            if payload is None:
                broken.append((attempt, number))
            elif payload["step"] not in by_step:
                by_step[payload["step"]] = payload | {"attempt": attempt}
            elif _content(by_step[payload["step"]]) != _content(payload | {"attempt": attempt}):
                conflicts.append((attempt, payload["step"], number))
        lines += [by_step[step] for step in sorted(by_step)]
    return MetricsReading(tuple(lines), tuple(conflicts), tuple(broken), tuple(torn))


def newest_lines(
    run: RunDirectory, attempt: str, count: int, upto: int | None = None
) -> list[dict[str, Any]]:
    """The attempt's last `count` whole lines, of steps up to `upto`, oldest first; fewer where it
    has fewer. Reads the end of the file alone."""
    try:
        file = run.metrics_of(attempt).open("rb")
    except FileNotFoundError:
        return []
    with file:
        size = file.seek(0, os.SEEK_END)
        length = _TAIL_BYTES
        while True:
            file.seek(max(0, size - length))
            data = file.read(min(size, length))
            # Where the reading began in the middle of a line, its rest is no line.
            texts = data[: data.rfind(b"\n") + 1].splitlines()[length < size :]
            lines = [line for text in texts if (line := _parse(text)) is not None]
            lines = [line for line in lines if upto is None or line["step"] <= upto]
            if len(lines) >= count or length >= size:
                return lines[-count:] if count > 0 else []
            # By fours, so that even lines of megabytes need few readings.
            length *= 4


def number_of(line: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key` of a metrics line; None where there is none (missing, null,
    NaN)."""
    value = line.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def is_not_finite(line: Mapping[str, Any], key: str) -> bool:
    """Whether the value under `key` is NaN or infinite, as a number or as the journal's word for
    it."""
    value = line.get(key)
    if isinstance(value, str):
        return value in NON_FINITE
    return isinstance(value, float) and not math.isfinite(value)


def _content(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != JOURNAL_HEAD}


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        payload = parse(text)
    except CodecError:
        return None
    return payload if type(payload.get("step")) is int else None
