"""What was acknowledged is never lost, and what failed leaves nothing behind."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opt_logbook.record.codec import CodecError
from opt_logbook.record.events import Entry, JournalRepaired, Note
from opt_logbook.record.journal import Journal, read, read_head
from opt_logbook.record.lock import Lock, LockLost
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.verify import verify

WRITER = """
import sys
from pathlib import Path
from opt_logbook.record.events import Entry, Note
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
    for event in journal.repairs:
        journal.append(Entry(1795356185.0, "", None, event))
    while True:
        entry = journal.append(Entry(1795356185.0, "1.00", None, Note("writer", "x" * 3000)))
        print(entry.seq, flush=True)
"""


def note(text: str = "hello") -> Entry:
    return Entry(1795356185.0, "1.00", 1, Note("maria", text))


def test_a_writer_killed_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    acknowledged = 0
    for kill in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            for _ in range(1 + kill * 3 % 7):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = int((writer.stdout.read().split() or [acknowledged])[-1])
        reading = read(run.journal)
        assert not reading.damaged
        assert reading.entries[-1].seq >= acknowledged
        assert [entry.seq for entry in reading.entries] == list(range(1, len(reading.entries) + 1))
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(note())
    assert verify(run) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs of 1 MB needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(ballast: Path) -> None:
    """Leave no space on the disk, to the last page."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)


def append_for_ever(journal: Journal) -> None:
    while True:
        journal.append(note("x" * 3000))


def test_a_full_disk_fails_the_append_cleanly_and_the_journal_works_again_with_space(
    small_disk: Path,
) -> None:
    run = RunDirectory(small_disk)
    ballast = small_disk / "ballast"
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(note())
        fill(ballast)
        before = journal.head.seq
        with pytest.raises(OSError, match="No space left"):
            append_for_ever(journal)
        appended = journal.head.seq
        assert before <= appended < before + 300
        assert read(run.journal).entries[-1].seq == appended
        ballast.unlink()
        assert journal.append(note("after")).seq == appended + 1
        assert read_head(run) == journal.head
    assert verify(run) == []


def test_a_half_line_that_could_not_be_cut_is_cut_before_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(note("first"))
        real_write, real_truncate = os.pwrite, os.ftruncate
        with monkeypatch.context() as sick:
            # The disk takes half a line, then nothing at all, not even the cut.
            def half(descriptor: int, data: bytes, offset: int) -> int:
                real_write(descriptor, data[: len(data) // 2], offset)
                raise OSError(errno.EIO, "input/output error")

            def broken(descriptor: int, length: int) -> None:
                raise OSError(errno.EIO, "input/output error")

            sick.setattr(os, "pwrite", half)
            sick.setattr(os, "ftruncate", broken)
            with pytest.raises(OSError, match="input/output"):
                journal.append(note("x" * 500))
            with pytest.raises(OSError, match="input/output"):
                journal.append(note("x" * 500))
        assert os.ftruncate is real_truncate
        assert read(run.journal).torn_bytes > 0
        assert journal.append(note("second")).seq == 2
    assert [entry.event for entry in read(run.journal).entries] == [
        Note("maria", "first"),
        Note("maria", "second"),
    ]
    assert verify(run) == []


def test_a_line_is_durable_though_the_head_could_not_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(note())
        with monkeypatch.context() as sick:

            def broken(source: Path, target: Path) -> None:
                raise OSError(errno.ENOSPC, "no space left")

            sick.setattr(os, "replace", broken)
            assert journal.append(note()).seq == 2
            behind = read_head(run)
            assert behind is not None
            assert behind.seq == 1
        assert verify(run) == []
        journal.append(note())
        assert read_head(run) == journal.head


def test_who_lost_the_lock_writes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lock = Lock.acquire(run)
    with Journal.open(run, lock) as journal:
        journal.append(note())
        run.lock.unlink()
        before = run.journal.read_bytes()
        with pytest.raises(LockLost):
            journal.append(note())
    assert run.journal.read_bytes() == before
    with pytest.raises(LockLost):
        Journal.open(run, lock)


def test_the_entry_returned_is_the_one_a_reader_sees(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        appended = journal.append(
            Entry(1795356185.12349, "1.00", None, Note("maria", "caf\u00e9 \udcff"))
        )
    assert read(run.journal).entries == (appended,)
    assert (appended.seq, appended.time) == (1, 1795356185.123)


def test_a_journal_that_is_not_there_is_no_lines(tmp_path: Path) -> None:
    reading = read(tmp_path / "journal.jsonl")
    assert (reading.entries, reading.head.seq, reading.torn_bytes) == ((), 0, 0)


def test_reading_while_a_line_is_being_written_sees_the_lines_before_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(note())
        with run.journal.open("ab") as file:
            file.write(b'{"seq":2,"ti')
        assert len(read(run.journal).entries) == 1
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert journal.repairs == (JournalRepaired(12),)


def test_an_event_that_no_reader_could_read_is_not_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(note())
        before = run.journal.read_bytes()
        number_for_text = Note("maria", 5)  # type: ignore[arg-type]
        with pytest.raises(CodecError):
            journal.append(Entry(1795356185.0, "1.00", 1, number_for_text))
        assert run.journal.read_bytes() == before
        assert journal.append(note("after")).seq == 2
    assert verify(run) == []
