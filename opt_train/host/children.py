"""Programs that may hang: each is started in a process group of its own, and has a deadline."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opt_train.host import signals
from opt_train.host.processes import dying_with_starter

OUTPUT_BYTES_MAX = 1 << 20
ERRORS_BYTES_MAX = 1 << 14
REAP_SECONDS = 5.0
"""For a killed program to be gone; one that hangs in the kernel is left behind."""


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How a program came to its end."""

    code: int | None
    """Its exit code, minus the signal's number if one ended it; None: it was killed at its
    deadline, or could not be started."""
    output: str
    """The beginning of its standard output."""
    errors: str
    """The end of its standard error."""

    @property
    def last_words(self) -> str:
        """The last line that it wrote to its standard error; empty: there is none."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class KillableChild:
    """A program in a process group of its own. It dies with the thread that started it.

    What it writes is kept in memory: the disk may be what is sick.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        """Start it. Raises OSError if that cannot be done."""
        self._output = os.memfd_create("output")
        self._errors = os.memfd_create("errors")
        try:
            # Deaf to signals that ask to stop, which reach every process of a node: whoever
            # started it ends it. Nothing of ours runs in the child: in a process with torch and
            # pyarrow in it, forked from a thread, that crashed or waited for ever now and then.
            with signals.blocked():
                self._child = subprocess.Popen(
                    dying_with_starter(command),
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._errors,
                    process_group=0,
                    env=dict(os.environ if environment is None else environment),
                )
        except BaseException:
            self._close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def ended_by(self, deadline: float) -> ProgramEnd:
        """What came of it, once it has ended or `deadline` (monotonic seconds) has passed and it
        was killed."""
        try:
            self._wait_until(deadline)
            code = self._child.poll()
            if code is None:
                self.kill()
                # A program that hangs in the kernel stays; its number is nobody else's meanwhile.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(REAP_SECONDS)
            output = os.pread(self._output, OUTPUT_BYTES_MAX, 0)
            size = os.fstat(self._errors).st_size
            errors = os.pread(self._errors, ERRORS_BYTES_MAX, max(0, size - ERRORS_BYTES_MAX))
            return ProgramEnd(
                code, output.decode(errors="replace"), errors.decode(errors="replace")
            )
        finally:
            self._close()

    def _wait_until(self, deadline: float) -> None:
        """Wait for its end, or for `deadline`, without polling: there may be a thousand of them."""
        # Until it is reaped, and nobody else does that, its number is its own.
        if self._child.poll() is not None:
            return
        ended = os.pidfd_open(self._child.pid)
        try:
            waiting = select.poll()
            waiting.register(ended, select.POLLIN)
            waiting.poll(1000.0 * max(0.0, deadline - time.monotonic()))
        finally:
            os.close(ended)

    def kill(self) -> None:
        """SIGKILL its whole group."""
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def _close(self) -> None:
        for descriptor in (self._output, self._errors):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def run_within(
    seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> ProgramEnd:
    """Run a program; after `seconds` it is killed with its group."""
    deadline = time.monotonic() + seconds
    try:
        child = KillableChild(command, environment)
    except OSError as error:
        return ProgramEnd(None, "", f"{command[0]} cannot be started: {error.strerror}")
    return child.ended_by(deadline)
