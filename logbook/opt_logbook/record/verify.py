"""Is the record of a run whole? Every line's hash, the anchors that find a cut tail, and what the
journal points to."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record import metrics
from opt_logbook.record.chain import Head, Reading, read_bytes
from opt_logbook.record.codec import GENESIS
from opt_logbook.record.events import (
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    RunFinished,
    RunHalted,
    RunStopped,
    TrainingBegan,
)
from opt_logbook.record.journal import read, read_head
from opt_logbook.record.run_directory import RunDirectory, tier_of

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Defect:
    """Something that is not as it should be: a sentence about `file`, and the line in it (0: the
    whole file)."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.what}"


def verify(run: RunDirectory) -> list[Defect]:
    """All that is wrong with the record of `run`; empty: nothing. Reads without a lock, while a run
    may live."""
    if not run.journal.exists():
        return [Defect(run.journal.name, 0, "is missing")]
    # Anchors first: what they name was durable before they were written, so a live writer cannot
    # make them look wrong.
    anchors = _anchors(run)
    measured = metrics.read(run)
    reading = read(run.journal)
    return (
        verify_lines(reading)
        + _verify_anchors(run, reading, anchors)
        + _verify_metrics(run, reading, measured)
        + _verify_checkpoints(run, reading)
    )


def verify_bytes(data: bytes) -> list[Defect]:
    """What is wrong with the lines of a journal by themselves: hashes, sequence and tear."""
    return verify_lines(read_bytes(data))


def verify_lines(reading: Reading) -> list[Defect]:
    """The same, of a journal that has been read."""
    name = "journal.jsonl"
    defects = [Defect(name, line, why) for line, why in reading.damaged]
    if reading.torn_bytes:
        what = f"the last line is torn ({reading.torn_bytes} bytes); the next writer cuts it off"
        defects.append(Defect(name, reading.line_count + 1, what))
    broken = {line for line, _ in reading.damaged}
    before = 0
    for line, entry in zip(reading.lines, reading.entries, strict=True):
        # A gap that damaged lines account for is among the defects already.
        if entry.seq != before + 1 and line - 1 not in broken:
            defects.append(
                Defect(
                    name, line, f"seq is {entry.seq} after {before}: lines are missing or repeated"
                )
            )
        before = entry.seq
    return sorted(defects, key=lambda defect: defect.line)


def _anchors(run: RunDirectory) -> list[tuple[str, int, str]]:
    """(file, line, head) wherever the run wrote down what its journal's newest line was."""
    found: list[tuple[str, int, str]] = []
    head = read_head(run)
    if head is not None:
        found.append((run.head.name, 0, str(head)))
    for attempt in metrics.attempts_in(run):
        with run.metrics_of(attempt).open("rb") as file:
            first = file.readline()
        found += [(_relative(run, run.metrics_of(attempt)), 1, text) for text in _heads_in(first)]
    # A folder lists its names in whatever order its file system has them.
    for manifest in sorted(run.checkpoints.glob(f"*/step-*/{MANIFEST}")):
        found += [(_relative(run, manifest), 0, text) for text in _heads_in(manifest.read_bytes())]
    return found


def _heads_in(data: bytes) -> list[str]:
    try:
        value = json.loads(data)[metrics.JOURNAL_HEAD]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [value] if isinstance(value, str) and value else []


def _verify_anchors(
    run: RunDirectory, reading: Reading, anchors: list[tuple[str, int, str]]
) -> list[Defect]:
    defects: list[Defect] = []
    if reading.line_count and not run.head.exists():
        defects.append(Defect(run.head.name, 0, "is missing, though the journal has lines"))
    elif run.head.exists() and read_head(run) is None:
        defects.append(Defect(run.head.name, 0, "cannot be read as `seq hash`"))
    for file, line, text in anchors:
        what = _wrong_with(text, reading)
        if what:
            defects.append(Defect(file, line, what))
    return defects


def _wrong_with(anchor: str, reading: Reading) -> str:
    """What an anchor (`seq hash`, or a hash alone) says against the journal; empty: nothing."""
    if len(anchor) == len(GENESIS) and " " not in anchor:
        known = anchor in reading.hashes or anchor == GENESIS
        if known:
            return ""
        return "names a journal line that the journal does not have: its tail was cut off"
    try:
        head = Head.parse(anchor)
    except ValueError:
        return f"its journal head {anchor!r} cannot be read as `seq hash`"
    if head.seq > reading.head.seq:
        return (
            f"names journal line {head.seq}, but the journal ends at {reading.head.seq}: its "
            "tail was cut off"
        )
    # A damaged line cannot contradict its anchor, and is among the defects already.
    found = next((entry.hash for entry in reading.entries if entry.seq == head.seq), head.hash)
    if found != head.hash:
        return (
            f"names another journal line {head.seq} than the journal has: the journal was cut "
            "and written on"
        )
    return ""


def _verify_metrics(
    run: RunDirectory, reading: Reading, measured: metrics.MetricsReading
) -> list[Defect]:
    defects = [
        Defect(
            _relative(run, run.metrics_of(attempt)),
            line,
            f"contradicts an earlier line of step {step}",
        )
        for attempt, step, line in measured.conflicts
    ]
    defects += [
        Defect(_relative(run, run.metrics_of(attempt)), line, "is no metrics line")
        for attempt, line in measured.broken
    ]
    for entry in reading.entries:
        if isinstance(entry.event, TrainingBegan) and not run.metrics_of(entry.attempt).exists():
            what = f"is missing, though attempt {entry.attempt} trained (journal line {entry.seq})"
            defects.append(Defect(_relative(run, run.metrics_of(entry.attempt)), 0, what))
    return defects


def _verify_checkpoints(run: RunDirectory, reading: Reading) -> list[Defect]:
    """Every checkpoint that should still be there has the manifest that was committed. Its shards
    are not read here."""
    committed = _committed_checkpoints(reading)
    found = {path: _wrong_with_manifest(run, path, committed[path]) for path in committed}
    if any(found.values()):
        # A live run may have given it up since the journal was read, which is on record before its
        # files go.
        committed = _committed_checkpoints(read(run.journal))
    return [
        Defect(f"{path}/{MANIFEST}", 0, what)
        for path, what in found.items()
        if what and path in committed
    ]


def _committed_checkpoints(reading: Reading) -> dict[str, tuple[int, str]]:
    """Journal line and manifest's sha256 of each checkpoint that should be there, by its path."""
    expected: dict[str, tuple[int, str]] = {}
    for entry in reading.entries:
        match entry.event:
            case CheckpointCommitted(path=path, manifest_sha256=sha256):
                expected[path] = (entry.seq, sha256)
            case CheckpointRetired(path=path) | CheckpointRejected(path=path):
                expected.pop(path, None)
            case RunStopped() | RunHalted():
                # What agents held in memory went with them, and the next start clears its
                # manifests.
                expected = {
                    path: known for path, known in expected.items() if tier_of(path) != "memory"
                }
            # The nodes are given back with the run, and with them what lay in their memory and on
            # their disks.
            case RunFinished():
                expected = {
                    path: known for path, known in expected.items() if tier_of(path) == "shared"
                }
            case _:
                pass
    return expected


def _wrong_with_manifest(run: RunDirectory, path: str, committed: tuple[int, str]) -> str:
    """What is wrong with the manifest of the checkpoint at `path`; empty: nothing."""
    seq, sha256 = committed
    # Hashed and not parsed: a line that verifies is no proof of who wrote it, and neither is its
    # path.
    try:
        found = hashlib.sha256((run.path / path / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return f"is missing, though journal line {seq} committed it"
    return "" if found == sha256 else f"is not what journal line {seq} committed"


def _relative(run: RunDirectory, path: Path) -> str:
    return str(path.relative_to(run.path))
