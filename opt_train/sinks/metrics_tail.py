"""Follows a run's `metrics/<attempt>.jsonl` from behind: whole lines alone, each (attempt, step)
once, in order."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opt_logbook.record.attempt import AttemptId
from opt_logbook.record.codec import NON_FINITE, CodecError, parse
from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.metrics import attempts_in
from opt_logbook.record.run_directory import RunDirectory

READ_BYTES = 1 << 20
"""Read at once; a metrics line has 4096 at the most."""


@dataclass(frozen=True, slots=True)
class MetricsLine:
    """One step's metrics."""

    attempt: str
    step: int
    time: float
    """Unix seconds."""
    values: Mapping[str, float]
    """Every number of the line but `step` and `time`, non-finite ones too. One of a list is
    `key/place`, so that a sink shows each layer's curve; the places of lists by layer are
    `embedding`, `layer_00` and so on, and `final`."""


@dataclass(frozen=True, slots=True)
class Position:
    """The last line that was forwarded."""

    attempt: str = ""
    step: int = -1
    sent: int = 0
    """Lines forwarded so far, over all attempts."""

    @classmethod
    def read(cls, path: Path) -> "Position":
        """What `write` left at `path`; the beginning where there is nothing that reads."""
        try:
            found = json.loads(path.read_text())
            position = cls(
                attempt=str(found["attempt"]), step=int(found["step"]), sent=int(found["sent"])
            )
            if position.attempt:
                AttemptId.parse(position.attempt)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()
        return position

    def write(self, path: Path) -> None:
        """Replace the file at `path`, whole or not at all."""
        replace_file(path, json.dumps(asdict(self)).encode() + b"\n")


class MetricsTail:
    """Reads on from a position."""

    def __init__(self, run: RunDirectory, position: Position) -> None:
        self._run = run
        self.position = position
        """Behind the newest line that `new_lines` gave."""
        self._offset = 0

    def new_lines(self) -> Iterator[MetricsLine]:
        """The lines that have come since, over as many attempts as there are; ends where nothing is
        new."""
        while True:
            # Listed before the old file is read to its end: nothing is written to it once a newer
            # one is there.
            later = self._later_attempts()
            yield from self._remaining_lines()
            if not later:
                return
            self.position = Position(later[0], -1, self.position.sent)
            self._offset = 0

    def _later_attempts(self) -> list[str]:
        attempts = attempts_in(self._run)
        if not self.position.attempt:
            return attempts
        here = AttemptId.parse(self.position.attempt)
        return [attempt for attempt in attempts if AttemptId.parse(attempt) > here]

    def _remaining_lines(self) -> Iterator[MetricsLine]:
        """The attempt's lines behind the position."""
        while self.position.attempt:
            try:
                with self._run.metrics_of(self.position.attempt).open("rb") as file:
                    # A crash of the machine may take lines that were not safe yet: read again, and
                    # let the position drop what was sent already.
                    if file.seek(0, os.SEEK_END) < self._offset:
                        self._offset = 0
                    file.seek(self._offset)
                    data = file.read(READ_BYTES)
            except FileNotFoundError:
                return
            data = data[: data.rfind(b"\n") + 1]  # what follows is torn, or still being written
            if not data:
                return
            self._offset += len(data)
            for text in data.splitlines():
                line = parse_line(text, self.position.attempt)
                if line is not None and line.step > self.position.step:
                    self.position = Position(line.attempt, line.step, self.position.sent + 1)
                    yield line


def parse_line(text: bytes, attempt: str) -> MetricsLine | None:
    """The metrics line; None where it does not read, which whoever verifies the run will say."""
    try:
        payload = parse(text)
    except CodecError:
        return None
    step, time = payload.get("step"), payload.get("time")
    if type(step) is not int:
        return None
    numbers = {key: _number(value) for key, value in _flat(payload) if key not in ("step", "time")}
    values = {key: number for key, number in numbers.items() if number is not None}
    return MetricsLine(
        attempt, step, float(time) if isinstance(time, (int, float)) else 0.0, values
    )


def _flat(payload: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of a list one by one."""
    for key, value in payload.items():
        if not isinstance(value, list):
            yield key, value
            continue
        places = [f"{place:0{len(str(len(value)))}}" for place in range(len(value))]
        if key.startswith("layer_") and len(value) > 2:
            places = ["embedding", *(f"layer_{place}" for place in places[:-2]), "final"]
        yield from ((f"{key}/{place}", each) for place, each in zip(places, value, strict=True))


def _number(value: Any) -> float | None:
    """The number, or what the word for a non-finite one means; None for anything else."""
    if isinstance(value, str):
        return NON_FINITE.get(value)
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:  # an integer of hundreds of digits
        return None
