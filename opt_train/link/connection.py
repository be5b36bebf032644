"""Lines of JSON over a stream: how agent and supervisor talk once both have proved the secret.

A line is one message. Whatever breaks the rules (an overlong line, garbage, silence) ends that
connection alone: the agent dials again, sends its whole state, and what was not acknowledged is
sent once more. So a link needs no repair, and a lost line costs nothing.

Lines from a peer that has not proved itself yet are short (`MAX_HANDSHAKE_BYTES`); `trust` lifts
that limit. How the proof goes is in `handshake.py`.
"""

import asyncio
from typing import Any

# Importing them fills the registry of messages.
from opt_train.protocol import commands, facts, orders  # noqa: F401
from opt_train.protocol.framing import (
    MAX_MESSAGE_BYTES,
    Message,
    ProtocolError,
    from_line,
    to_line,
)

MAX_HANDSHAKE_BYTES = 1024
"""The longest line a peer may send before it has proved itself."""
MAX_UNSENT_BYTES = 16 << 20
"""A peer that reads so slowly that this much waits for it is cut off; it dials again and is sent
what matters."""
_UNSENT_AT_CLOSE_BYTES = 1 << 16
_READ_BYTES = 1 << 16


class LinkRefused(Exception):
    """The peer broke the rules of the link, or fell silent; the connection is of no more use."""


class Connection:
    """An open link. `node` and `leader` are what the handshake established."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        """For what is no line: the bytes of a file, behind the last line that was received."""
        self._buffer = bytearray()
        self._limit = MAX_HANDSHAKE_BYTES
        self.node = ""
        self.leader = 0

    def trust(self, node: str, leader: int) -> None:
        """The handshake is done: longer lines are allowed from here on."""
        self.node, self.leader = node, leader
        self._limit = MAX_MESSAGE_BYTES

    async def receive(self, deadline_seconds: float) -> Message:
        """The next message.

        Raises:
            LinkRefused: the peer closed, was silent for `deadline_seconds`, or sent what is no
                message.
        """
        line = await self.receive_line(deadline_seconds)
        try:
            return from_line(line)
        except ProtocolError as error:
            raise LinkRefused(f"not a message: {error}") from None

    async def receive_line(self, deadline_seconds: float) -> bytes:
        """The next line without its newline. Raises `LinkRefused` as `receive` does."""
        try:
            # TCP by itself does not notice a cut cable as long as nothing is sent: heartbeats come
            # every second, and their absence is the only sign there is.
            async with asyncio.timeout(deadline_seconds):
                return await self._line()
        except TimeoutError:
            raise LinkRefused(f"silent for {deadline_seconds:g} s") from None
        except OSError as error:
            raise LinkRefused(f"connection lost: {error}") from None

    async def _line(self) -> bytes:
        searched = 0  # of the buffer: a line that comes in many pieces is not searched anew
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._limit:
                raise LinkRefused(f"a line longer than {self._limit} bytes")
            chunk = await self._reader.read(_READ_BYTES)
            if not chunk:
                raise LinkRefused("closed by the peer")
            self._buffer += chunk
        if end > self._limit:
            raise LinkRefused(f"a line longer than {self._limit} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def send(self, message: Any) -> None:
        """Queue `message` (a Message or a JSON value) for sending; never waits.

        Raises:
            LinkRefused: the peer reads so slowly that too much waits for it, or the connection is
                closed.
        """
        if self.writer.is_closing():
            raise LinkRefused("the connection is closed")
        # asyncio buffers without end: one agent that has stopped reading would take all the memory
        # of the supervisor of two thousand.
        if self.unsent_bytes > MAX_UNSENT_BYTES:
            self.close()
            raise LinkRefused(
                f"more than {MAX_UNSENT_BYTES} bytes wait for a peer that does not read"
            )
        self.writer.write(to_line(message))

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was sent. Raises `LinkRefused` when the
        connection is lost."""
        try:
            await self.writer.drain()
        except OSError as error:
            raise LinkRefused(f"connection lost: {error}") from None

    @property
    def unsent_bytes(self) -> int:
        return self.writer.transport.get_write_buffer_size()

    @property
    def closed(self) -> bool:
        return self.writer.is_closing()

    def close(self) -> None:
        """Drop the connection at once, unsent bytes included if the peer does not take them."""
        # A close waits for the peer to take what is left: for a stuck one that would be for ever.
        if self.unsent_bytes > _UNSENT_AT_CLOSE_BYTES:
            self.abort()
        else:
            self.writer.close()

    def abort(self) -> None:
        """Drop the connection, and whatever is unsent."""
        self.writer.transport.abort()
