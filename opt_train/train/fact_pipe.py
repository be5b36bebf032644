"""Publishes a rank's facts: down a pipe whose reader may be slow, stuck or gone, without ever
waiting for it."""

import contextlib
import os
import select
import time
from collections import deque
from dataclasses import replace
from typing import Protocol

from opt_train.protocol.facts import ExitNotice, Metrics, Phase, Progress, SaveFailed
from opt_train.protocol.framing import MAX_FACT_BYTES, Message, to_line


class Publish(Protocol):
    """Takes a fact; returns at once."""

    def __call__(self, fact: Message) -> None: ...


class FactPipe:
    """The write end of the pipe to the agent.

    While the pipe is full, metrics are dropped and counted; everything else waits in memory, in
    order, and goes out with a later fact. A phase or progress that a newer one has overtaken is
    forgotten, so the queue stays short.
    """

    def __init__(self, fd: int) -> None:
        # A full pipe must raise: a reader that is stuck would otherwise stop the training loop.
        os.set_blocking(fd, False)
        self._fd = fd
        self._waiting: deque[tuple[Message, bytes]] = deque()
        self.dropped_metrics = 0
        self.reader_gone = False

    def __call__(self, fact: Message) -> None:
        self.publish(fact)

    def publish(self, fact: Message) -> None:
        """Send `fact`, or keep it for later. Returns at once, whatever the reader does.

        Raises:
            ValueError: the fact has no line of `MAX_FACT_BYTES`, even with its text cut.
        """
        if isinstance(fact, ExitNotice):
            fact = replace(fact, dropped_metrics=self.dropped_metrics)
        line = fitting_line(fact)
        self._flush()
        if not self._waiting and self._write(line):
            return
        if isinstance(fact, Metrics):
            self.dropped_metrics += 1
            return
        if (
            isinstance(fact, (Phase, Progress))
            and self._waiting
            and type(self._waiting[-1][0]) is type(fact)
        ):
            self._waiting.pop()
        self._waiting.append((fact, line))

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Hand over what still waits, for at most `timeout_seconds`, and close the pipe."""
        deadline = time.monotonic() + timeout_seconds
        self._flush()
        while self._waiting and not self.reader_gone and (left := deadline - time.monotonic()) > 0:
            select.select([], [self._fd], [], left)
            self._flush()
        os.close(self._fd)

    def _flush(self) -> None:
        while self._waiting and self._write(self._waiting[0][1]):
            self._waiting.popleft()

    def _write(self, line: bytes) -> bool:
        """Whether `line` is dealt with. A line of PIPE_BUF bytes at most is written whole or not at
        all."""
        if self.reader_gone:
            return True
        try:
            os.write(self._fd, line)
        except BlockingIOError:
            return False
        except OSError:
            # Nobody will ever read this pipe again. That is for the control pipe to notice, not for
            # the step.
            self.reader_gone = True
        return True


def fitting_line(fact: Message) -> bytes:
    """`fact` as a line of at most `MAX_FACT_BYTES`.

    A long reason loses its end, and a note stands for it. Metrics of a model with very many layers
    lose what is listed by layer.

    Raises:
        ValueError: it is too long for another reason.
    """
    line = to_line(fact)
    if len(line) <= MAX_FACT_BYTES:
        return line
    if isinstance(fact, (ExitNotice, SaveFailed)):
        # Characters may take several bytes, escapes included, so halve until it fits.
        keep = len(fact.reason)
        while len(line) > MAX_FACT_BYTES and keep:
            keep //= 2
            cut = (
                f"{fact.reason[:keep]} ... ({len(fact.reason) - keep} more characters are cut off)"
            )
            line = to_line(replace(fact, reason=cut))
    if isinstance(fact, Metrics):
        short = {
            key: None if isinstance(value, list) else value for key, value in fact.line.items()
        }
        line = to_line(Metrics(short))
    if len(line) > MAX_FACT_BYTES:
        raise ValueError(
            f"a {fact.kind} fact of {len(line)} bytes does not fit a pipe's {MAX_FACT_BYTES}"
        )
    return line


def log_line(text: str) -> None:
    """One line for the rank's log, at once. A log that takes no more, on a full disk, must not end
    training."""
    with contextlib.suppress(OSError):
        os.write(1, text.encode("utf-8", "replace") + b"\n")
