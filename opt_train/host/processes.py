"""Processes as the kernel shows them (Linux: /proc, pidfd). A pid alone proves nothing: pids are
used again."""

import ctypes
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NODE_MARK = "OPT_TRAIN_NODE"
"""Environment variable that every process of a node inherits: so they are found, whoever their
parent is by now."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl
"""Looked up here: between fork and exec even the dynamic linker's lock may be another thread's."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What `/proc/<pid>/stat` says: the kernel's state letter, the parent, and clock ticks since
    boot at the start."""

    state: str
    parent: int
    start_ticks: int


def stat_of(pid: int) -> Stat | None:
    """The process now; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses itself: what counts begins after the
    # last one.
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(
        state=fields[0].decode("ascii", "replace"),
        parent=int(fields[1]),
        start_ticks=int(fields[19]),
    )


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether the very process that started at `start_ticks` still runs; a zombie does not."""
    status = stat_of(pid)
    return status is not None and status.start_ticks == start_ticks and status.state not in "ZX"


def mark_of(run_directory: Path, node: str) -> str:
    """The value of `NODE_MARK` for a node of a run: unique on a machine."""
    return f"{run_directory.resolve()}#{node}"


def bears_mark(pid: int, mark: str) -> bool:
    """Whether the process was started with this mark in its environment."""
    try:
        return f"{NODE_MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
            b"\0"
        )
    except OSError:
        return False


def marked(mark: str) -> Iterator[int]:
    """Every living process that bears the mark."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and bears_mark(int(name), mark):
            status = stat_of(int(name))
            if status is not None and status.state not in "ZX":
                yield int(name)


def send_signal(pid: int, number: int, certain: Callable[[int], bool]) -> bool:
    """Send a signal to `pid` if `certain(pid)` holds while the process is pinned, so that no
    namesake is ever hit."""
    try:
        pinned = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not certain(pid):
            return False
        signal.pidfd_send_signal(pinned, number)
    except OSError:
        return False
    finally:
        os.close(pinned)
    return True


def kill_marked(mark: str, patience_seconds: float = 10.0) -> bool:
    """SIGKILL every process that bears the mark, until none is left; False if some survive (state
    D) that long."""
    deadline = time.monotonic() + patience_seconds
    scans_without = 0
    while True:
        living = list(marked(mark))
        for pid in living:
            send_signal(pid, signal.SIGKILL, lambda p: bears_mark(p, mark))
        # In the middle of an exec a process shows no environment for an instant: one empty scan
        # proves nothing.
        scans_without = 0 if living else scans_without + 1
        if scans_without == 2:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def die_with_parent(parent: int) -> Callable[[], None]:
    """For `preexec_fn`: the child is SIGKILLed when the thread that started it ends, however that
    comes about.

    That must be the main thread, which ends with the process. Other threads may run meanwhile, such
    as the agent's helper: a child has none of them, and what they had locked stays locked. Python's
    own locks and malloc's are set right by the fork, and no other is needed here: nothing is
    imported, looked up, logged, hashed or opened, only two system calls are made. What the helper
    may have locked (OpenSSL, files) is left alone until exec makes all new.
    """

    def set_death_signal() -> None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return set_death_signal


def adopt_orphans(whether: bool) -> None:
    """Whether this process becomes the parent of descendants whose own parent ends."""
    _PRCTL(_PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0)


_DIE_WITH_STARTER = """
import ctypes, os, sys
starter, number = int(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(None).prctl(1, number, 0, 0, 0)
if os.getppid() != starter:
    sys.exit(1)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def dying_with_starter(command: Sequence[str], number: int = signal.SIGKILL) -> list[str]:
    """The command of a process that becomes `command` and is sent signal `number` when the thread
    that starts it ends.

    For those who may have any library loaded, or start it from any thread: nothing of this process
    runs between fork and exec, as it does with `die_with_parent`. It costs some 20 ms.

    Raises:
        OSError: there is no such program.
    """
    # The shim would start whatever becomes of the program: whoever asks wants to know at once.
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    shim = [sys.executable, "-I", "-S", "-c", _DIE_WITH_STARTER]
    return [*shim, str(os.getpid()), str(int(number)), *command]
