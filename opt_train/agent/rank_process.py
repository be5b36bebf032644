"""One process of a rank, from import to exit: two pipes, a log, and how the kernel saw its end.

Facts come through a pipe of their own and not through stdout, which any library writes to. A line
of a fact has at most 4096 bytes: Linux writes that much to a pipe at once (PIPE_BUF), so that lines
of two threads never mix and a full pipe never tears one; a longer line on a non-blocking pipe is
torn. (srun's stdio tears lines of 4 KB, too, and one task that does not read blocks all: it
carries nothing that matters.)
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection

from opt_train.agent.rank_log import RankLog
from opt_train.agent.rank_starter import RankStarter
from opt_train.host.processes import stat_of
from opt_train.protocol.facts import FACTS_OF_A_RANK, Metrics, is_metrics_line
from opt_train.protocol.framing import MAX_FACT_BYTES, Message, ProtocolError, from_line

_READ_BYTES = 1 << 16
_EXIT_READ_BYTES = 4 << 20
"""The most that is still read from the pipe of a process that is gone."""

log = logging.getLogger(__name__)


class RankProcess:
    """A rank's process, its own process group, killed by the kernel if this agent dies.

    `on_fact` is called with each fact it sends, `on_end` once, after its last fact, when it has
    been reaped. What it writes is in `log`.
    """

    def __init__(
        self,
        starter: RankStarter,
        on_fact: Callable[["RankProcess", Message], None],
        on_end: Callable[["RankProcess"], None],
        cores: Collection[int] = (),
    ) -> None:
        """Have `starter` start it, to run on `cores`; none: wherever the agent may. Raises OSError
        if that cannot be done."""
        self.pid = 0
        """0: it has not been forked yet."""
        self.garbage_lines = 0
        self.returncode: int | None = None
        self.log = RankLog()
        self.ended = asyncio.Event()
        self._on_fact, self._on_end = on_fact, on_end
        self._buffer = bytearray()
        self._skipping = False
        self._signals_sent: set[int] = set()
        self._is_unwanted = False
        """It was killed before it was forked."""
        self._loop = asyncio.get_running_loop()
        facts_read, facts_write = os.pipe()
        control_read, control_write = os.pipe()
        self._pidfd = -1
        try:
            starter.start(self.log.fileno(), facts_write, control_read, self._take_pid, cores)
        except BaseException:
            os.close(facts_read)
            os.close(control_write)
            raise
        finally:
            os.close(facts_write)
            os.close(control_read)
        self._facts, self._control = facts_read, control_write
        os.set_blocking(self._facts, False)
        os.set_blocking(self._control, False)

    def _take_pid(self, pid: int, code: int, words: bytes) -> None:
        if pid == 0:
            if words:
                os.write(self.log.fileno(), words)
            self._finish(code)
            return
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            # Too many files are open, say: nobody would see its end.
            log.error("process %d cannot be watched, and is ended: %s", pid, error)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._finish(1)
            return
        # Not before: a fact may be here earlier than the pid that its receiver asks for.
        self._loop.add_reader(self._facts, self._read)
        self._loop.add_reader(self._pidfd, self._reap)
        if self._is_unwanted:
            self.kill()

    @property
    def process_state(self) -> str:
        """The kernel's state of it now, one letter; empty when it is gone."""
        if self.returncode is not None or not self.pid:
            return ""  # its number may be another's by now
        status = stat_of(self.pid)
        return "" if status is None else status.state

    @property
    def killed_by_agent(self) -> bool:
        """It died of a signal that this object sent."""
        return self.returncode is not None and -self.returncode in self._signals_sent

    def send(self, line: bytes) -> bool:
        """Write a line to its control pipe without waiting; False if it does not read or is
        gone."""
        try:
            return self.returncode is None and os.write(self._control, line) == len(line)
        except OSError:
            return False

    def ask_stacks(self) -> None:
        """SIGUSR2: the rank's faulthandler writes the stacks of all its threads to its log."""
        self._signal(signal.SIGUSR2, lambda number: os.kill(self.pid, number))

    def kill(self) -> None:
        """SIGKILL the process and its whole group. A stopped process, or one that ignores
        signals, dies of it as well."""
        self._signal(signal.SIGKILL, lambda number: os.killpg(self.pid, number))

    def _signal(self, number: int, send: Callable[[int], None]) -> None:
        # Not reaped yet, so the pid is still its own. Dead already is not "killed by us": ask
        # without reaping.
        if self.returncode is not None:
            return
        if not self.pid:
            self._is_unwanted |= number == signal.SIGKILL
            return
        dead = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if dead is None:
            self._signals_sent.add(number)
        with contextlib.suppress(ProcessLookupError):
            send(number)

    def _reap(self) -> None:
        # What it leaves behind in its group (a data worker, say) has no business without it. Before
        # the zombie is reaped: until then nobody else can have its number.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Its last facts name descriptors of its own: they are opened under its number, while that
        # is still its own.
        budget = _EXIT_READ_BYTES
        while budget > 0 and (count := self._read()) > 0:
            budget -= count
        _, status = os.waitpid(self.pid, 0)
        self._finish(os.waitstatus_to_exitcode(status))

    def _finish(self, code: int) -> None:
        self._close_facts()
        os.close(self._control)
        self.returncode = code
        if self.garbage_lines:
            log.warning("process %d sent %d lines that are no facts", self.pid, self.garbage_lines)
        self.ended.set()
        self._on_end(self)

    def _read(self) -> int:
        """Read once from the facts pipe; returns the bytes read."""
        if self._facts < 0:
            return 0
        try:
            chunk = os.read(self._facts, _READ_BYTES)
        except BlockingIOError:
            return 0
        if not chunk:
            self._close_facts()
            return 0
        *lines, rest = (bytes(self._buffer) + chunk).split(b"\n")
        for line in lines:
            if self._skipping:
                self._skipping = False  # the end of a line that was too long
            else:
                self._take_line(line)
        if len(rest) > MAX_FACT_BYTES:
            self.garbage_lines += not self._skipping
            self._skipping = True
        self._buffer = bytearray(b"" if self._skipping else rest)
        return len(chunk)

    def _take_line(self, line: bytes) -> None:
        try:
            if len(line) >= MAX_FACT_BYTES:
                raise ProtocolError("too long")
            fact = from_line(line)
            if not isinstance(fact, FACTS_OF_A_RANK):
                raise ProtocolError("not a fact of a rank")
            if isinstance(fact, Metrics) and not is_metrics_line(fact.line):
                raise ProtocolError("a metrics line is an object with a step")
        except ProtocolError as error:
            self.garbage_lines += 1
            if (
                self.garbage_lines.bit_count() == 1
            ):  # the 1st, 2nd, 4th, 8th: a flood must not fill the log
                log.warning(
                    "process %d: line %d that is no fact: %s", self.pid, self.garbage_lines, error
                )
            return
        self._on_fact(self, fact)

    def _close_facts(self) -> None:
        if self._facts >= 0:
            self._loop.remove_reader(self._facts)
            os.close(self._facts)
            self._facts = -1
