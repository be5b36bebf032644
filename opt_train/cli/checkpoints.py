"""`opt-train checkpoints`: each checkpoint folder of a run, what the journal says of it, and what
it is worth.

Folders and journal are read beside each other, without a lock; nothing in the run is changed.
"""

import argparse
import json
import textwrap
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from opt_logbook.record import lock
from opt_logbook.record.events import (
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    RunStopped,
    SaveAbandoned,
)
from opt_logbook.record.run_directory import RunDirectory, tier_of

from opt_train.checkpoint import manifest
from opt_train.checkpoint.listing import Listed, list_checkpoints
from opt_train.checkpoint.manifest import CheckpointError
from opt_train.cli.progress import report_bytes
from opt_train.protocol.exits import DONE, NO
from opt_train.run.checkpoint import FASTEST_LAST, MEMORY, NODE, SHARED
from opt_train.run.report.run_report import RunReport
from opt_train.run.state import RunState, Stage

COLUMNS = 100
LIVE, ABANDONED = "live", "abandoned"


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint folder; also one that the journal knows and that is not there."""

    path: str
    """Relative to the run directory."""
    attempt: str
    step: int
    tier: str
    bytes: int
    files: int
    healthy: bool | None
    """Whether training was well when it was saved; None: its manifest cannot be asked."""
    committed: float | None
    """Unix seconds of the journal's line; None: the journal knows no commit of it."""
    branch: str
    """`live`, or `abandoned`: it was left by a restart from an earlier step. Empty: it is not
    committed, or not now."""
    state: str
    """`good` or `abandoned`, by branch, as the journal has it · `rejected` when it was wanted and
    did not verify · `retired` or `given up`, and not yet removed · `never committed` · `unknown` to
    the journal, with a manifest."""
    checked: str
    """`listed`: its manifest is readable and the sizes are right · `verified`: all its bytes are ·
    `held`: its manifest is readable, and agents hold its files, which they verify when they are
    wanted · `bad` · ``-``: it is no checkpoint."""
    why: str
    """What is wrong with it, in a sentence."""
    referred: tuple[str, ...]
    """What goes by it, in words."""
    next: bool = False
    """A restart would take it now."""


class JournalRecord:
    """What the journal's lines say of each path."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.commits: dict[str, Entry] = {}
        self.manifests: dict[str, str] = {}
        self.fates: dict[str, tuple[str, str]] = {}
        """(state, why) of what is not, or no longer, a checkpoint to go by."""
        self.beginnings: dict[str, list[str]] = defaultdict(list)
        """Attempts that began with it."""
        self.stop: RunStopped | None = None
        for entry in entries:
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        match entry.event:
            case CheckpointCommitted(path=path, manifest_sha256=sha256):
                self.commits[path], self.manifests[path] = entry, sha256
                self.fates.pop(path, None)
            case CheckpointRejected(path=path, why=why):
                self.fates[path] = ("rejected", why)
            case CheckpointRetired(path=path):
                self.fates[path] = ("retired", "its removal has not ended; the next start ends it")
            case SaveAbandoned(path=path, why=why):
                self.fates[path] = ("given up", why)
            case AttemptStarted(checkpoint=path):
                self.beginnings[path].append(entry.attempt)
                self.stop = None
            case RunStopped() as stopped:
                self.stop = stopped


def _branch_of(path: str, known: set[str], live: set[str]) -> str:
    """Whether the checkpoint is on the live chain; empty: the journal has no line of it."""
    if path not in known:
        return ""
    return LIVE if path in live else ABANDONED


def _fate_of(branch: str, has_manifest: bool) -> str:
    """What became of a checkpoint that the journal neither retired nor rejected."""
    if branch:
        return "good" if branch == LIVE else ABANDONED
    # A manifest that no line tells of: another run's, or a commit whose journal line was lost.
    return "unknown" if has_manifest else ""


def _check_of(why: str, tier: str, was_verified: bool) -> str:
    """What is known of the files; `why` says what is wrong with them."""
    if why:
        return "bad"
    if tier != SHARED:
        return "held"  # only the agents that hold them can read them
    return "verified" if was_verified else "listed"


def rows_of(
    run: RunDirectory,
    state: RunState,
    record: JournalRecord,
    listed: Sequence[Listed],
    verified: Mapping[Path, str] | None,
) -> list[Row]:
    """Folders and journal in one, by attempt and step.

    Args:
        verified: what was wrong with the bytes of each folder that was read, empty: nothing; None:
            none was.
    """
    known = {c.path: c for c in state.checkpoints}
    live = {c.path for c in state.chain()}
    rows = []
    for one in [*listed, *_gone(run, state, listed)]:
        path = one.path.relative_to(run.path).as_posix()
        why = one.why.replace(f"{run.path}/", "") or (verified or {}).get(one.path, "")
        branch = _branch_of(path, set(known), live)
        fate, reason = record.fates.get(path, ("", ""))
        if not fate:
            fate = _fate_of(branch, one.has_manifest)
        commit = record.commits.get(path)
        tier = tier_of(path)
        checked = _check_of(why, tier, verified is not None)
        if fate == "" or (fate in ("retired", "given up") and not one.has_manifest):
            checked, why = "-", reason
        elif fate == "unknown":
            why = why or "the journal knows no commit of it, so the next start removes it"
        elif fate != "good":
            why = why or reason
        rows.append(
            Row(
                path,
                one.attempt,
                one.step,
                tier,
                one.bytes,
                one.files,
                one.healthy,
                None if commit is None else commit.time,
                branch,
                fate or "never committed",
                checked,
                why,
                _referred(run, state, record, path, one, branch),
            )
        )
    taken = taken_next(state, rows)
    return sorted(
        (replace(row, next=row.path == taken) for row in rows),
        key=lambda row: (_numbers(row.attempt), row.step, FASTEST_LAST.index(row.tier)),
    )


def taken_next(state: RunState, rows: Sequence[Row]) -> str:
    """The path that a restart would take: the journal's newest good one, but for those found bad
    here."""
    bad = {row.path for row in rows if row.checked == "bad"}
    known = state.reconsidered() if state.stage is Stage.HALTED else state.checkpoints
    marked = tuple(replace(c, rejected=c.rejected or c.path in bad) for c in known)
    newest = replace(state, checkpoints=marked).newest_good()
    return newest.path if newest is not None else ""


def _gone(run: RunDirectory, state: RunState, listed: Sequence[Listed]) -> list[Listed]:
    there = {one.path for one in listed}
    missing = [c for c in state.checkpoints if run.path / c.path not in there]
    why = "the journal has it as committed, and its folder is gone"
    return [
        Listed(run.path / c.path, c.attempt, c.step, 0, 0, why, has_manifest=False) for c in missing
    ]


def _referred(
    run: RunDirectory, state: RunState, record: JournalRecord, path: str, one: Listed, branch: str
) -> tuple[str, ...]:
    told = []
    beginnings = record.beginnings.get(path, [])
    if beginnings:
        told.append(
            f"attempt{'s' if len(beginnings) > 1 else ''} {', '.join(beginnings)} began with it"
        )
    if record.stop is not None and branch == LIVE and one.step == record.stop.saved_step:
        told.append(f"the stop asked by {record.stop.by} saved it")
    live = state.live
    if (
        not branch
        and live is not None
        and one.attempt == live.name
        and lock.live_holder_of(run) is not None
    ):
        told.append(f"attempt {live.name} still trains and may be saving it")
    return tuple(told)


def _numbers(attempt: str) -> tuple[int, ...]:
    parts = attempt.split(".")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


# The verb -----------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `opt-train checkpoints`."""
    parser.add_argument(
        "--verify", action="store_true", help="read and hash every byte, not names and sizes alone"
    )


def run(flags: argparse.Namespace) -> int:
    """List the checkpoint folders of the run at `flags.run`; with `--verify`, read all their
    bytes.

    Returns: `NO` if there is nothing that a restart could take.
    """
    directory = RunDirectory(flags.run)
    report = RunReport(directory)
    record = JournalRecord(report.story.reading.entries)
    committed = {directory.path / path: sha256 for path, sha256 in record.manifests.items()}
    listed = list_checkpoints(directory.checkpoints, committed)
    verified = _verified(directory, listed, committed) if flags.verify else None
    rows = rows_of(
        directory,
        report.state,
        record,
        [*listed, *_held(directory, report.state, committed)],
        verified,
    )
    if flags.json:
        print(json.dumps([_payload(row) for row in rows], indent=2))
    else:
        print(_page(report.created.name, rows, time.time()))
    return DONE if any(row.next for row in rows) else NO


def _held(run: RunDirectory, state: RunState, committed: Mapping[Path, str]) -> list[Listed]:
    """What agents hold, as far as the journal still counts on it."""
    known = {run.path / c.path for c in state.checkpoints}
    found = [
        one
        for tier in (NODE, MEMORY)
        for one in list_checkpoints(run.checkpoints_of(tier), committed, files_here=False)
    ]
    return [one for one in found if one.path in known]


def _verified(
    run: RunDirectory, listed: Sequence[Listed], committed: Mapping[Path, str]
) -> dict[Path, str]:
    """Folder to what is wrong with its bytes, of all that look right in a list; progress goes to
    stderr."""
    wanted = [one for one in listed if not one.why]
    total, done = sum(one.bytes for one in wanted), 0
    found = {}
    report = report_bytes("verifying", total, _size)
    for one in wanted:
        try:
            manifest.verify(
                one.path, committed.get(one.path), manifest.shifted(report, done, total)
            )
            found[one.path] = ""
        except CheckpointError as error:
            found[one.path] = str(error).replace(f"{run.path}/", "")
        done += one.bytes
    return found


def _payload(row: Row) -> dict[str, object]:
    return {
        **asdict(row),
        "committed": _time(row.committed, "milliseconds") if row.committed is not None else None,
    }


def _page(name: str, rows: Sequence[Row], now: float) -> str:
    if not rows:
        return f"{name} has no checkpoint yet"
    taken = next((row for row in rows if row.next), None)
    would = (
        f"a restart would take step {taken.step} of attempt {taken.attempt}"
        if taken
        else "none could be restored"
    )
    count = f"{len(rows)} checkpoint{'s' if len(rows) > 1 else ''}"
    heading = f"{name}: {count}, {_size(sum(row.bytes for row in rows))}; {would}"
    head = (
        "",
        "step",
        "attempt",
        "tier",
        "size",
        "files",
        "committed (UTC)",
        "age",
        "health",
        "journal",
        "checked",
    )
    cells = [head, *(_cells(row, now) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = [heading]
    for number, line in enumerate(cells):
        padded = [
            cell.rjust(w) if k in (1, 4, 5, 7) else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
        if number:
            lines += _remarks(rows[number - 1])
    return "\n".join(lines)


def _cells(row: Row, now: float) -> tuple[str, ...]:
    health = {None: "-", True: "well", False: "unwell"}[row.healthy]
    time_, age = "-", "-"
    if row.committed is not None:
        time_, age = _time(row.committed), _age(now - row.committed)
    state = "live" if row.state == "good" else row.state
    return (
        ">" if row.next else "",
        str(row.step),
        row.attempt,
        row.tier,
        _size(row.bytes),
        str(row.files),
        time_,
        age,
        health,
        state,
        row.checked,
    )


def _remarks(row: Row) -> list[str]:
    """What does not fit into a column, below the row."""
    said = [row.why] if row.why else []
    lines: list[str] = []
    for remark in [*said, *row.referred]:
        lines += textwrap.wrap(
            remark,
            COLUMNS,
            initial_indent=" " * 6,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
    return lines


def _time(unix: float, precision: str = "minutes") -> str:
    text = datetime.fromtimestamp(unix, UTC).isoformat(timespec=precision).replace("+00:00", "")
    return f"{text}Z" if precision != "minutes" else text.replace("T", " ")


def _age(seconds: float) -> str:
    if seconds < 0:
        return "future"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
