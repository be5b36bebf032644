"""What reaches a rank: commands and orders from the control pipe, and the signals that ask it to
stop."""

import os
import select
import signal
from types import FrameType
from typing import Protocol

from opt_train.protocol.commands import Begin
from opt_train.protocol.framing import MAX_MESSAGE_BYTES, Message, ProtocolError, from_line
from opt_train.protocol.orders import Order
from opt_train.train.fact_pipe import log_line

_READ_BYTES = 1 << 16


class AgentGone(Exception):
    """The control pipe has no writer any more: the agent died, and its ranks follow."""


class OrderSource(Protocol):
    """Where a training loop gets its orders from."""

    def poll(self) -> list[Order]:
        """Orders that came since the last call; does not wait."""
        ...


class NoOrders:
    """For `opt-train train` without an agent, which obeys nothing but signals."""

    def poll(self) -> list[Order]:
        return []


class ControlPipe:
    """The read end of the pipe from the agent: first `Begin`, then orders, a JSON line each."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._rest = b""
        self._orders: list[Order] = []

    def wait_for_begin(self) -> Begin | None:
        """The first `Begin`; None if the agent went away before it sent one."""
        while True:
            select.select([self._fd], [], [])
            try:
                messages = self._read()
            except AgentGone:
                return None
            begins = [message for message in messages if isinstance(message, Begin)]
            self._keep(messages)
            if begins:
                return begins[0]

    def poll(self) -> list[Order]:
        """Orders that came since the last call; does not wait.

        Raises:
            AgentGone: the pipe was closed at the other end.
        """
        self._keep(self._read())
        orders, self._orders = self._orders, []
        return orders

    def _keep(self, messages: list[Message]) -> None:
        self._orders += [message for message in messages if isinstance(message, Order)]

    def _read(self) -> list[Message]:
        while True:
            try:
                piece = os.read(self._fd, _READ_BYTES)
            # Empty for now. End of file, by contrast, reads as no bytes: no writer is left, which
            # is how a rank learns of its agent's end even where PDEATHSIG did not reach it.
            except BlockingIOError:
                break
            if not piece:
                raise AgentGone
            self._rest += piece
        # A line may come in pieces; the last piece waits for its end.
        *lines, self._rest = self._rest.split(b"\n")
        if len(self._rest) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"a line on the control pipe is longer than {MAX_MESSAGE_BYTES} bytes"
            )
        return [message for line in lines if (message := _message(line)) is not None]


def _message(line: bytes) -> Message | None:
    try:
        return from_line(line)
    except ProtocolError as error:
        # An order that cannot be read must not end training; the supervisor withdraws what nobody
        # obeys.
        log_line(f"control pipe: {error}")
        return None


class StopSignals:
    """Turns SIGTERM and SIGUSR1 (Slurm sends both before it kills) into a vote to stop."""

    def __init__(self) -> None:
        self.received = ""

    def listen(self, *more: signal.Signals) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, *more):
            # The default of SIGUSR1 is death, and Slurm sends it to every process of a step.
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
