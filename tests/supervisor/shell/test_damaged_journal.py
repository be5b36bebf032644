"""A line of the journal that cannot be read any more may have begun an attempt: nothing of it is
ever reused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record.events import AttemptStarted, Entry, LineageOpened, Note, SupervisorStarted
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.supervisor.shell.start import _folded
from tests.agent.harness import created

ATTEMPTS = 3
Spoil = Callable[[list[bytes]], list[bytes]]


def started(number: int) -> AttemptStarted:
    return AttemptStarted(number + 1, "", "", "", ("node-1",), (), 1, f"reason {number}", 0, "c0")


def spoil_the_newest_attempt(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b"reason 2", b"reason X") for line in lines]


def cut_the_tail(lines: list[bytes]) -> list[bytes]:
    return lines[:4]


def make_the_last_line_unreadable(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], b"\x00" * len(lines[-1])]


@pytest.mark.parametrize(
    "spoil", [spoil_the_newest_attempt, cut_the_tail, make_the_last_line_unreadable]
)
def test_names_and_fencing_numbers_are_not_used_twice(tmp_path: Path, spoil: Spoil) -> None:
    """A second attempt 1.02 would drop its metrics as told already, and could not save where the
    first one had."""
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(Entry(1.7e9, "", None, created()))
        journal.append(Entry(1.7e9, "", None, LineageOpened(1, "c0")))
        for number in range(ATTEMPTS):
            journal.append(
                Entry(1.7e9, "", None, SupervisorStarted(number + 1, "host", 1, "0", number > 0))
            )
            journal.append(Entry(1.7e9, f"1.{number:02d}", 0, started(number)))
    run.journal.write_bytes(b"".join(spoil(run.journal.read_bytes().splitlines(keepends=True))))

    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        state = _folded(journal)
        assert state.next_attempt(1) > f"1.{ATTEMPTS - 1:02d}"
        assert state.generation >= ATTEMPTS
        assert state.leader >= ATTEMPTS
        journal.append(Entry(1.7e9, "", None, Note("a", "b")))
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert _folded(journal) == state, "told once, counted once"
