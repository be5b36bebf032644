"""Who may write the journal: `journal.lock` names the one process that does.

Theory of operation. The lock is what the file says, not an flock that is kept: an flock dies with
its process, which is good, but over NFS also with a lost connection, and it cannot say who has it.
So the file names a process, and is read, judged and written under a brief flock: of two processes
that race exactly one wins.

What it says outlives its writer. A lock is stale when its process is gone from this host, or has
another start time (the number was given to somebody else), or belonged to an earlier start of the
same Slurm job, whose nodes were taken before this one began. Of another host nothing can be known:
a person must say that it is gone.

`leader` is the fencing number: the supervisor that takes over writes a higher one, and agents obey
no lower one than they have seen. A supervisor that was frozen and wakes finds another name or
number in the file (`is_mine`, before every line of the journal) and writes nothing.

The file is written where it lies and not replaced: processes that wait for its flock wait for this
inode, and a rename would leave each with a lock of its own. A half-written one is read as nobody's,
which it is: its writer died before `acquire` returned.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from opt_logbook.record.run_directory import RunDirectory


class LockHeld(Exception):
    """Another live process writes this run's journal; the message names it and the fix."""

    def __init__(self, message: str, holder: "Holder") -> None:
        super().__init__(message)
        self.holder = holder


class LockLost(Exception):
    """This process had the lock and has it no more: it must write nothing."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process as the lock names it."""

    host: str
    pid: int
    start: str
    """Start time of the process in clock ticks since boot, and the boot it counts from: unlike
    `pid` never reused."""
    slurm_job: str = ""
    slurm_restart: int = 0
    leader: int = 0
    """Fencing number of the supervisor; 0 for anybody else."""

    @classmethod
    def myself(cls, leader: int = 0) -> Self:
        # Slurm sets it from the first requeue on; before that there is no such variable.
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            start=start_of(os.getpid()) or "",
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restart=int(restart) if restart.isdecimal() else 0,
            leader=leader,
        )

    def is_gone(self, asking: "Holder") -> bool:
        """Whether the process is known not to live any more, as seen by `asking`, who runs here."""
        if self.host == asking.host:
            return start_of(self.pid) != self.start
        return (
            bool(self.slurm_job)
            and self.slurm_job == asking.slurm_job
            and self.slurm_restart < asking.slurm_restart
        )


class Lock:
    """Held from `acquire` to `release`, or until the process dies."""

    def __init__(self, run: RunDirectory, holder: Holder) -> None:
        self._run = run
        self._holder = holder

    @classmethod
    def acquire(cls, run: RunDirectory, leader: int = 0) -> Self:
        """Take the lock, over a stale one too.

        Raises:
            LockHeld: another live process holds it, or one of another host, of which nothing is
                known.
            OSError: the run directory is not there or cannot be written.
        """
        mine = Holder.myself(leader)
        with _opened(run.lock) as descriptor:
            other = _read(descriptor)
            if other is not None and not other.is_gone(mine):
                raise LockHeld(_held_sentence(run, other, mine), other)
            _write(descriptor, mine)
        return cls(run, mine)

    @property
    def leader(self) -> int:
        return self._holder.leader

    def set_leader(self, leader: int) -> None:
        """Write another fencing number into the lock, once the journal has been read and the next
        is known.

        Raises:
            LockLost: the lock is not held any more.
        """
        with _opened(self._run.lock) as descriptor:
            if _read(descriptor) != self._holder:
                raise LockLost(f"{self._run.lock} is not held by this process any more")
            self._holder = replace(self._holder, leader=leader)
            _write(descriptor, self._holder)

    def is_mine(self) -> bool:
        """Whether the file, read again, still names this process and this leader."""
        return holder_of(self._run) == self._holder

    def touch(self) -> None:
        """Show that its process lives, to whoever sees the file change and cannot see the process.

        Raises:
            OSError: the file is not there, or its file system cannot.
        """
        os.utime(self._run.lock)

    def release(self) -> None:
        """Give the lock back.

        Harmless where it is lost already, or where nothing can be written any more: a lock whose
        process is gone is stale by itself, and an error here would hide what the process came to.
        """
        with suppress(OSError):
            if not self._run.lock.exists():
                return
            with _opened(self._run.lock) as descriptor:
                if _read(descriptor) == self._holder:
                    os.ftruncate(descriptor, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def holder_of(run: RunDirectory) -> Holder | None:
    """Who the lock names, dead or alive; None: nobody."""
    try:
        descriptor = os.open(run.lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # A writer empties the file before it fills it. Shared, a reader waits for both, and never
        # for another reader.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return _read(descriptor)
    finally:
        os.close(descriptor)


def live_holder_of(run: RunDirectory) -> Holder | None:
    """Who writes the journal now, as far as this host can know; None: nobody."""
    holder = holder_of(run)
    return None if holder is None or holder.is_gone(Holder.myself()) else holder


def start_of(pid: int) -> str | None:
    """Start time of a process of this host that lives; None: there is none, or only its zombie."""
    try:
        # The command's name, in parentheses, may itself contain spaces and parentheses.
        state, *rest = (
            Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    # A zombie has exited and writes nothing, and may stay for ever under a parent that does not
    # reap it. `starttime` is field 22 of proc(5), and `rest` begins with field 4.
    return None if state in "ZX" else f"{rest[18]}@{boot}"


def _held_sentence(run: RunDirectory, other: Holder, mine: Holder) -> str:
    job = f" (Slurm job {other.slurm_job})" if other.slurm_job else ""
    fix = f"stop it there first; if that host is gone for good, remove {run.lock}"
    if other.host == mine.host:
        fix = "stop it first, or wait for it"
    return f"{run.path} is in the hands of process {other.pid} on {other.host}{job}; {fix}"


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The lock file, open and under the brief flock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_file_at(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_file_at(path: Path, descriptor: int) -> bool:
    """False where somebody removed the file while we waited for its flock: then we have a lock on
    something that nobody else will ever open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Holder | None:
    # Bounded: anything may lie at this path, and a lock is a few hundred bytes.
    text = os.pread(descriptor, 1 << 16, 0)
    try:
        payload = json.loads(text)
        holder = Holder(**{k: payload[k] for k in Holder.__slots__})
    except (ValueError, TypeError, KeyError):
        # Empty (released), or half written by a process that died writing it: it never had the
        # lock.
        return None
    return holder if type(holder.pid) is int and type(holder.slurm_restart) is int else None


def _write(descriptor: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode() + b"\n"
    os.ftruncate(descriptor, 0)
    written = os.pwrite(descriptor, text, 0)
    if written != len(text):
        os.ftruncate(descriptor, 0)
        # A full disk writes a part and reports no error; ENOSPC would come with the next write.
        raise OSError(28, "no space for the lock")
    # Over NFS a write stays with its client until fsync or close, and the next to ask for the lock
    # may ask from another host.
    os.fsync(descriptor)
