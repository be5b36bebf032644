"""How an agent gets a held file from another: over TCP, after both have proved the run's secret,
one file a connection.

The handshake is that of `link`, with roles of its own, so that no proof of the one serves in the
other; the getter's proof covers what it asks for. A request names a file that is held or it gets
nothing: no path is made of a peer's words. What comes is good only if it has the manifest's size
and hash, so a source need not be believed.
"""

import asyncio
import contextlib
import fcntl
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from opt_train.agent.snapshots.store import HeldFile, NotHeld, PartialFile, SnapshotStore
from opt_train.checkpoint.manifest import FileEntry
from opt_train.link.connection import HANDSHAKE_SECONDS, Connection, LinkRefused
from opt_train.link.secret import SecretUnusable
from opt_train.protocol.framing import ProtocolError, parse

STALL_SECONDS = 20.0
"""A peer that takes longer for one piece is given up: `PIECE_BYTES` when getting, `_SLICE_BYTES`
when sending."""
MAX_STRANGERS = 64
"""Connections that have not proved themselves yet; more are closed at the door."""
MAX_SERVED = 64
"""Files sent at a time."""
PIECE_BYTES = 1 << 20
_SLICE_BYTES = 1 << 22
_MAX_WHY = 300
_VERSION = 1
_NONCE = re.compile(r"[0-9a-f]{64}")
_SIOCGIFADDR = 0x8915

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    path: str
    name: str
    bytes: int


class TransferServer:
    """Gives what its agent holds to other agents of the run."""

    def __init__(
        self,
        shelf: SnapshotStore,
        secret: Callable[[], Awaitable[bytes]],
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._shelf, self._secret, self._stall_seconds = shelf, secret, stall_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._served = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> str:
        """Listen at `host`, an IPv4 address, on a free port. Returns ``host:port``. Raises
        OSError."""
        self._server = await asyncio.start_server(self._accept, host, 0, backlog=128)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Listen no more, and cut off who is being served."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= MAX_STRANGERS:
            writer.transport.abort()
            return
        self._strangers += 1
        task = asyncio.create_task(self._serve(Connection(reader, writer), writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        stranger = True
        try:
            async with asyncio.timeout(
                2 * HANDSHAKE_SECONDS
            ):  # a byte now and then does not hold the door open
                request = await prove_holder(connection, await self._secret())
            self._strangers -= 1
            stranger = False
            self._served += 1
            try:
                await self._answer(connection, writer, request)
            finally:
                self._served -= 1
        except (LinkRefused, NotHeld, SecretUnusable, TimeoutError, OSError) as trouble:
            log.info("a transfer ended: %s", str(trouble) or "the peer was too slow")
        finally:
            self._strangers -= stranger
            # after a close in good order the bytes have left, and this does nothing
            writer.transport.abort()

    async def _answer(
        self, connection: Connection, writer: asyncio.StreamWriter, request: _Request
    ) -> None:
        try:
            if self._served > MAX_SERVED:
                raise NotHeld("too many files are being sent already")
            async with self._shelf.reading(request.path, request.name) as file:
                if file.bytes != request.bytes:
                    raise NotHeld(
                        f"{request.name} of {request.path} has {file.bytes} bytes here, not "
                        f"{request.bytes}"
                    )
                connection.send({"bytes": file.bytes})
                # Only then: the getter reads lines up to here, and bytes from here on.
                if (await _object(connection)).get("go") is not True:
                    raise LinkRefused("the getter wants no bytes")
                await self._send(writer, file)
        except NotHeld as refused:
            connection.send({"why": _words(refused)})
        async with asyncio.timeout(self._stall_seconds):
            writer.close()
            await writer.wait_closed()

    async def _send(self, writer: asyncio.StreamWriter, file: HeldFile) -> None:
        loop, offset = asyncio.get_running_loop(), 0
        with os.fdopen(file.descriptor, "rb", buffering=0, closefd=False) as content:
            while offset < file.bytes:
                async with asyncio.timeout(self._stall_seconds):
                    if file.in_memory:
                        sent = await loop.sendfile(
                            writer.transport,
                            content,
                            offset,
                            min(_SLICE_BYTES, file.bytes - offset),
                        )
                    else:  # sendfile would wait for the disk in the loop's thread
                        piece = await file.piece(offset)
                        writer.write(piece)
                        await writer.drain()
                        sent = len(piece)
                if sent == 0:
                    raise LinkRefused("the file became shorter while it was sent")
                offset += sent


async def get(
    address: str,
    secret: bytes,
    path: str,
    name: str,
    entry: FileEntry,
    draft: PartialFile,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Write the file `name` of checkpoint `path`, as the agent at `address` holds it, into `draft`.

    Raises:
        Unreachable: nobody answers there.
        NotHeld: the source does not give the file, or not all of it, or too slowly.
        OSError: the draft cannot be written.
    """
    host, _, port = address.rpartition(":")
    try:
        ipaddress.IPv4Address(host)  # a name would have to be looked up
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            reader, writer = await asyncio.open_connection(host, int(port), limit=PIECE_BYTES)
    except (OSError, ValueError, OverflowError, TimeoutError) as trouble:
        raise Unreachable(f"{address} cannot be reached: {_reason(trouble)}") from None
    connection = Connection(reader, writer)
    try:
        await prove_getter(connection, secret, _Request(path, name, entry.bytes))
        answer = await _object(connection)
        if "why" in answer:
            raise NotHeld(f"{address} does not give {name} of {path}: {_words(answer['why'])}")
        if answer.get("bytes") != entry.bytes:
            offered = _words(answer.get("bytes"))
            raise NotHeld(
                f"{address} offers {offered} bytes for {name} of {path} instead of {entry.bytes}"
            )
        connection.send({"go": True})
        await _receive(
            reader,
            entry.bytes,
            draft,
            stall_seconds,
            f"{address} sent only {{}} of {name} of {path}",
        )
    except LinkRefused as refused:
        raise NotHeld(f"{address} does not give {name} of {path}: {refused}") from None
    finally:
        writer.transport.abort()


class Unreachable(NotHeld):
    """Nobody answers at an address: asking it for another file is of no use."""


async def _receive(
    reader: asyncio.StreamReader, size: int, draft: PartialFile, stall_seconds: float, short: str
) -> None:
    written: Awaitable[int] | None = (
        None  # one piece is hashed and written while the next one comes
    )
    offset = 0
    while offset < size:
        try:
            async with asyncio.timeout(stall_seconds):
                piece = await reader.readexactly(min(PIECE_BYTES, size - offset))
        except (asyncio.IncompleteReadError, OSError, TimeoutError) as trouble:
            cut = not isinstance(trouble, TimeoutError)
            why = "and was cut off" if cut else f"and then too little for {stall_seconds:g} s"
            came = offset + (
                len(trouble.partial) if isinstance(trouble, asyncio.IncompleteReadError) else 0
            )
            raise NotHeld(f"{short.format(f'{came} of {size} bytes')}, {why}") from None
        if written is not None:
            await written
        written = draft.write(piece)
        offset += len(piece)
    if written is not None:
        await written


# The handshake ------------------------------------------------------------------------------------


async def prove_holder(connection: Connection, secret: bytes) -> _Request:
    """The server's side; returns what the getter asks for. Raises `LinkRefused` if it does not know
    the secret."""
    hello = await _object(connection)
    theirs = hello.get("nonce")
    if (
        hello.get("transfer") != _VERSION
        or not isinstance(theirs, str)
        or not _NONCE.fullmatch(theirs)
    ):
        raise LinkRefused("the peer does not speak this version of transfers")
    mine = secrets.token_hex(32)
    connection.send({"nonce": mine, "proof": _proof(secret, "holder", theirs, mine)})
    asked = await _object(connection)
    path, name, size = asked.get("path"), asked.get("name"), asked.get("bytes")
    proof = _proof(secret, "getter", theirs, mine, path, name, size)
    if not _same(proof, asked.get("proof")):
        raise LinkRefused("whoever asks for a file does not know this run's secret")
    if not isinstance(path, str) or not isinstance(name, str) or type(size) is not int:
        raise LinkRefused("the request is malformed")
    return _Request(path, name, size)


async def prove_getter(connection: Connection, secret: bytes, request: _Request) -> None:
    """The client's side, and its request. Raises `LinkRefused` if the server does not know the
    secret."""
    mine = secrets.token_hex(32)
    connection.send({"transfer": _VERSION, "nonce": mine})
    challenge = await _object(connection)
    theirs = challenge.get("nonce")
    if not isinstance(theirs, str) or not _same(
        _proof(secret, "holder", mine, theirs), challenge.get("proof")
    ):
        raise LinkRefused("it does not know this run's secret")
    words = (request.path, request.name, request.bytes)
    proof = _proof(secret, "getter", mine, theirs, *words)
    connection.send(
        {"proof": proof, "path": request.path, "name": request.name, "bytes": request.bytes}
    )


def _proof(secret: bytes, role: str, getter_nonce: str, holder_nonce: str, *words: Any) -> str:
    # Another first word than the link's: no proof of the one is one of the other.
    said = json.dumps(["opt_train transfer", _VERSION, role, getter_nonce, holder_nonce, *words])
    return hmac.new(secret, said.encode(), "sha256").hexdigest()


def _same(proof: str, said: Any) -> bool:
    return isinstance(said, str) and said.isascii() and hmac.compare_digest(proof, said)


async def _object(connection: Connection) -> dict[str, Any]:
    try:
        return parse(await connection.receive_line(HANDSHAKE_SECONDS))
    except ProtocolError as error:
        raise LinkRefused(str(error)) from None


def _words(said: Any) -> str:
    return " ".join(str(said).split())[:_MAX_WHY]


def _reason(trouble: BaseException) -> str:
    if isinstance(trouble, OSError) and trouble.errno and trouble.errno > 0:
        return os.strerror(trouble.errno)  # asyncio's own words repeat the address
    return str(trouble) or f"no answer for {HANDSHAKE_SECONDS:g} s"


# Where to listen ----------------------------------------------------------------------------------


def host_of(interface: str) -> str:
    """The IPv4 address of a network interface; without one, what this host's name stands for. May
    ask a name server.

    As for NCCL, `interface` may be several names, with commas, and the beginning of a name.

    Raises:
        OSError: there is no such interface, it has no address, or the name is unknown.
    """
    if not interface:
        return str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
    names = [name for _, name in socket.if_nameindex()]
    wanted = interface.removeprefix("=").split(",")
    found = [
        n
        for w in wanted
        for n in sorted(names, key=lambda name: name != w)
        if n.startswith(w) and w
    ]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in found:
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                return socket.inet_ntoa(answer[20:24])
    raise OSError(
        f"no network interface {interface!r} with an IPv4 address; there are: {', '.join(names)}"
    )
