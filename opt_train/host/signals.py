"""The signals by which a scheduler, or a person, asks a job to end. They reach every process of it
that can be found.

Only the supervisor and the ranks that train answer them. Agents and other helpers leave them alone
from birth on: they are started with the signals blocked, which is inherited, and ignore them before
they let them in.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator

ASK_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """What this thread starts meanwhile is born with the signals blocked; other threads still take
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASK_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def were_blocked() -> bool:
    """Whether this process was started so, and not by a person at a terminal."""
    return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def ignore() -> None:
    """Ignore them from now on, those that came while they were blocked too; so does whatever is
    started later."""
    for number in ASK_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK_TO_STOP)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Meanwhile the signals end nothing: what is given says whether one has come. For the main
    thread."""
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in ASK_TO_STOP}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 77`` for what has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
