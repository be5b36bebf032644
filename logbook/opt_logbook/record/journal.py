"""The journal of a run: a file of lines that one process appends to and anybody reads
(docs/journal.md).

Theory of operation. An append is a barrier: when it returns, the line is on the disk, and only then
may anybody act on it. Three things can go wrong, and each has its own answer:

- **The writer dies in the middle of a line.** The last line is torn: no newline, or no JSON. Nobody
  has acted on it, so the next writer cuts it off and says so (`repairs`).
- **The disk is full.** A part of the line may stand in the file. It is cut off at once, or before
  the next append where even that fails; the caller gets the error and may append again.
- **Somebody else has taken the lock**, since this host looked dead from theirs. The lock is read
  again before every line: better a supervisor that stops than two histories in one file.

`journal.head` names the newest line, by a rename after each append: it finds a tail that was cut
off cleanly, which no hash can. It is written after the line is durable and may therefore be behind,
never ahead; a journal that ends before its head has lost lines.
"""

import contextlib
import os
from pathlib import Path
from typing import Self

from opt_logbook.record.chain import NO_LINE, Damage, Head, Reading, read_bytes
from opt_logbook.record.codec import decode, encode
from opt_logbook.record.durable_file import replace_file, sync_folder
from opt_logbook.record.events import Entry, Event, JournalDamaged, JournalRepaired
from opt_logbook.record.lock import Lock, LockLost
from opt_logbook.record.run_directory import RunDirectory

__all__ = [
    "NO_LINE",
    "Damage",
    "Head",
    "Journal",
    "LockLost",
    "Reading",
    "read",
    "read_head",
    "repairs_of",
]


def read(path: Path) -> Reading:
    """The entries at `path` and what does not verify; no file is no lines.

    Needs no lock and may run while the journal is being written: a line that is half there is read
    as a torn one.
    """
    try:
        return read_bytes(path.read_bytes())
    except FileNotFoundError:
        return read_bytes(b"")


def read_head(run: RunDirectory) -> Head | None:
    """The line that `journal.head` names; None where it is missing or unreadable."""
    try:
        return Head.parse(run.head.read_text("ascii"))
    except (OSError, ValueError):
        return None


class Journal:
    """The journal as its one writer has it, the process with the lock."""

    def __init__(self, run: RunDirectory, lock: Lock, descriptor: int, reading: Reading) -> None:
        self._run = run
        self._lock = lock
        self._descriptor = descriptor
        self._bytes = reading.good_bytes
        self._clean = reading.torn_bytes == 0
        self.reading = reading
        self.entries = reading.entries
        """The entries as they were when the journal was opened."""
        self.head = reading.head
        self.repairs: tuple[Event, ...] = ()
        """What the caller should append first, in this order: damage not yet journalled, the torn
        line that was cut off."""

    @classmethod
    def open(cls, run: RunDirectory, lock: Lock) -> Self:
        """The journal, ready for appending; made if there is none. A torn last line is cut off.

        Raises:
            LockLost: `lock` is not held any more.
            OSError: the file cannot be read or written.
        """
        if not lock.is_mine():
            raise LockLost(f"{run.lock} is not held by this process")
        # Without O_APPEND, under which Linux ignores the offset of pwrite.
        descriptor = os.open(run.journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            reading = read(run.journal)
            journal = cls(run, lock, descriptor, reading)
            journal.repairs = repairs_of(reading, read_head(run))
            journal._cut_half_line()
            # fdatasync of a new file makes its bytes durable and not its name: without this, power
            # loss could take the whole journal.
            sync_folder(run.path)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    def append(self, entry: Entry) -> Entry:
        """The entry as a reader will see it, with its seq and hash: durable in the file.

        After an error nothing has been appended, and the journal can be used again.

        Raises:
            LockLost: somebody else has taken the lock.
            CodecError: a field is of the wrong type, so that no reader could read the line.
            OSError: the line could not be made durable, for example on a full disk.
        """
        if not self._lock.is_mine():
            raise LockLost(f"{self._run.lock} is not held by this process any more")
        seq = self.head.seq + 1
        line = encode(entry, seq, self.head.hash)
        # Before it is written: a line that nobody can read must not stand in the file.
        appended = decode(line)
        self._cut_half_line()
        # Before the write: whatever becomes of it, the next append cuts first.
        self._clean = False
        try:
            _write_all(self._descriptor, line, self._bytes)
            os.fdatasync(self._descriptor)
        except OSError:
            # A half line may stand in the file. Cut it now if the disk lets us, else before the
            # next append.
            with contextlib.suppress(OSError):
                self._cut_half_line()
            raise
        self._clean = True
        self._bytes += len(line)
        self.head = Head(seq, appended.hash)
        self._replace_head()
        return appended

    def close(self) -> None:
        """Close the file. The lock is its owner's to release."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cut_half_line(self) -> None:
        if not self._clean:
            os.ftruncate(self._descriptor, self._bytes)
            os.fdatasync(self._descriptor)
            self._clean = True

    def _replace_head(self) -> None:
        # The line is durable already, so an error here must not look like a failed append: the
        # caller would repeat it. A head that is behind is still true; the next append tries again.
        with contextlib.suppress(OSError):
            replace_file(self._run.head, f"{self.head}\n".encode(), durable=True)


def repairs_of(reading: Reading, anchor: Head | None) -> tuple[Event, ...]:
    """The lines that whoever appends next should append first. `anchor` is what `journal.head`
    names."""
    events: list[Event] = []
    # The tail that is gone comes first: the next append replaces `journal.head`, the only witness.
    if anchor is not None and anchor.seq > reading.head.seq:
        why = (
            f"journal.head names line {anchor.seq}, but the journal ends at line "
            f"{reading.head.seq}: its tail is gone"
        )
        events.append(JournalDamaged(anchor.seq, why))
    if reading.torn_bytes:
        events.append(JournalRepaired(reading.torn_bytes))
    # A line that names one behind itself was about a tail that was gone, not about the line that
    # stands there now.
    journalled = {
        entry.event.line
        for line, entry in zip(reading.lines, reading.entries, strict=True)
        if isinstance(entry.event, JournalDamaged) and entry.event.line < line
    }
    events += [JournalDamaged(line, why) for line, why in reading.damaged if line not in journalled]
    return tuple(events)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    # A full disk writes a part and returns its length; only the next write says ENOSPC.
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
