"""The link between an agent and the supervisor: lines of JSON over a stream, after both sides have
proved the secret.

The handshake is a challenge and response by HMAC-SHA256 over role, node, the supervisor's number
and both nonces. The role keeps one side's proof from serving as the other's; two fresh nonces make
a recording worthless; the secret itself never travels. Whatever breaks the rules (a wrong proof, an
overlong line, garbage, silence) ends that connection alone.
"""

import asyncio
import hmac
import json
import re
import secrets
from typing import Any

from opt_train.protocol import commands, facts, orders  # noqa: F401 - importing them fills the registry of messages
from opt_train.protocol.framing import (
    MAX_MESSAGE_BYTES,
    Message,
    ProtocolError,
    from_line,
    parse,
    to_line,
)

HANDSHAKE_SECONDS = 5.0
"""A peer that has not proved itself by then is cut off."""
MAX_HANDSHAKE_BYTES = 1024
"""The longest line a peer may send before it has proved itself."""
MAX_UNSENT_BYTES = 16 << 20
"""A peer that reads so slowly that this much waits for it is cut off; it dials again and is told
what matters."""
NODE_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VERSION = 1


class LinkRefused(Exception):
    """The peer broke the rules of the link, or fell silent; the connection is of no more use."""


class Connection:
    """An open link. `node` and `leader` are what the handshake established."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
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
            async with asyncio.timeout(deadline_seconds):
                return await self._line()
        except TimeoutError:
            raise LinkRefused(f"silent for {deadline_seconds:g} s") from None
        except OSError as error:
            raise LinkRefused(f"connection lost: {error}") from None

    async def _line(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._limit:
                raise LinkRefused(f"a line longer than {self._limit} bytes")
            chunk = await self._reader.read(1 << 16)
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
        if self._writer.is_closing():
            raise LinkRefused("the connection is closed")
        if self.unsent_bytes > MAX_UNSENT_BYTES:
            self.close()
            raise LinkRefused(
                f"more than {MAX_UNSENT_BYTES} bytes wait for a peer that does not read"
            )
        self._writer.write(to_line(message))

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was sent. Raises `LinkRefused` when the
        connection is lost."""
        try:
            await self._writer.drain()
        except OSError as error:
            raise LinkRefused(f"connection lost: {error}") from None

    @property
    def unsent_bytes(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    @property
    def closed(self) -> bool:
        return self._writer.is_closing()

    def close(self) -> None:
        """Drop the connection at once, unsent bytes included if the peer does not take them."""
        if self.unsent_bytes > 1 << 16:
            self._writer.transport.abort()
        else:
            self._writer.close()


async def prove_agent(connection: Connection, secret: bytes, node: str, least_leader: int) -> None:
    """The agent's side of the handshake, as `node`.

    Raises:
        LinkRefused: the supervisor does not know the secret, or leads with a number below
            `least_leader`.
    """
    mine = secrets.token_hex(32)
    connection.send({"link": _VERSION, "node": node, "nonce": mine})
    challenge = await _object(connection)
    theirs, leader = _text(challenge, "nonce"), challenge.get("leader")
    if type(leader) is not int:
        raise LinkRefused("the supervisor told no number")
    if not hmac.compare_digest(
        _proof(secret, "supervisor", node, leader, mine, theirs), _text(challenge, "proof")
    ):
        raise LinkRefused("the supervisor does not know this run's secret")
    if leader < least_leader:
        raise LinkRefused(f"supervisor {leader} has been succeeded by {least_leader}")
    connection.send({"proof": _proof(secret, "agent", node, leader, mine, theirs)})
    if (await _object(connection)).get("welcome") is not True:
        raise LinkRefused("the supervisor did not take our proof")
    connection.trust(node, leader)


async def prove_supervisor(connection: Connection, secret: bytes, leader: int) -> None:
    """The supervisor's side: after this, `connection.node` is who dialled in.

    Raises:
        LinkRefused: the peer does not know the secret, or does not speak this protocol.
    """
    hello = await _object(connection)
    if hello.get("link") != _VERSION:
        raise LinkRefused("the peer does not speak this link's version")
    node, theirs = _text(hello, "node"), _text(hello, "nonce")
    if not NODE_FORM.fullmatch(node) or not re.fullmatch(r"[0-9a-f]{64}", theirs):
        raise LinkRefused("the peer's name or nonce is malformed")
    mine = secrets.token_hex(32)
    proof = _proof(secret, "supervisor", node, leader, theirs, mine)
    connection.send({"nonce": mine, "leader": leader, "proof": proof})
    answer = _text(await _object(connection), "proof")
    if not hmac.compare_digest(_proof(secret, "agent", node, leader, theirs, mine), answer):
        raise LinkRefused(f"whoever says to be {node} does not know this run's secret")
    connection.send({"welcome": True})
    connection.trust(node, leader)


def _proof(
    secret: bytes, role: str, node: str, leader: int, agent_nonce: str, supervisor_nonce: str
) -> str:
    # A JSON list keeps the parts apart: no two different lists of strings have the same bytes.
    said = json.dumps(
        ["opt_train link", _VERSION, role, node, leader, agent_nonce, supervisor_nonce]
    )
    return hmac.new(secret, said.encode(), "sha256").hexdigest()


async def _object(connection: Connection) -> dict[str, Any]:
    try:
        return parse(await connection.receive_line(HANDSHAKE_SECONDS))
    except ProtocolError as error:
        raise LinkRefused(str(error)) from None


def _text(payload: dict[str, Any], key: str) -> str:
    value = payload.get(key)
    if not isinstance(value, str) or not value.isascii():
        raise LinkRefused(f"the handshake's {key!r} is missing or malformed")
    return value
