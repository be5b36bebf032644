"""How an agent gets a file from another: over TCP, after both have proved the run's secret,
one file a connection.

The handshake is that of `link`, with roles of its own, so that no proof of the one serves in the
other; the getter's proof covers what it asks for. A request names a file that is kept or it gets
nothing: no path is made of what a peer sends. What comes is good only if it has the manifest's size
and hash, so a source need not be believed.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from opt_train.agent.snapshots.partial_file import PartialFile
from opt_train.agent.snapshots.placement import SnapshotMissing
from opt_train.agent.snapshots.snapshot_file import OpenSnapshot
from opt_train.agent.snapshots.store import SnapshotStore
from opt_train.checkpoint.manifest import FileEntry
from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import TcpEndpoint, dial, parse_host_and_port
from opt_train.link.handshake import (
    HANDSHAKE_SECONDS,
    NONCE_FORM,
    is_same,
    make_nonce,
    prove,
    receive_object,
)
from opt_train.link.listener import AuthenticatedListener

STALL_SECONDS = 20.0
"""A peer that takes longer for one piece is given up: `PIECE_BYTES` when getting, `_SLICE_BYTES`
when sending."""
ADMISSION_SECONDS = 2 * HANDSHAKE_SECONDS
STRANGERS_MAX = 64
"""Connections that have not proved themselves yet; more are closed at the door."""
SERVED_MAX = 64
"""Files sent at a time."""
PIECE_BYTES = 1 << 20
_SLICE_BYTES = 1 << 22
_MAX_WHY = 300
_BACKLOG = 128
_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A file of a checkpoint, of the size that the manifest names."""

    path: str
    name: str
    bytes: int


class TransferServer:
    """Gives the files that its agent has to other agents of the run."""

    def __init__(
        self,
        store: SnapshotStore,
        secret: Callable[[], Awaitable[bytes]],
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._store, self._secret, self._stall_seconds = store, secret, stall_seconds
        self._served = 0
        self._listener = AuthenticatedListener(
            self._admit,
            self._serve,
            admission_seconds=ADMISSION_SECONDS,
            strangers_max=STRANGERS_MAX,
        )

    async def start(self, host: str) -> str:
        """Listen at `host`, an IPv4 address, on a free port. Returns ``host:port``. Raises
        OSError."""
        bound = await self._listener.start(TcpEndpoint(host), backlog=_BACKLOG)
        return str(bound).removeprefix("tcp:")

    async def stop(self) -> None:
        """Listen no more, and cut off who is being served."""
        await self._listener.stop()

    async def _admit(self, connection: Connection) -> Request:
        return await prove_holder(connection, await self._secret())

    async def _serve(self, connection: Connection, request: Request) -> None:
        self._served += 1
        try:
            await self._answer(connection, request)
        except (LinkRefused, TimeoutError, OSError) as trouble:
            log.info("a transfer ended: %s", str(trouble) or "the peer was too slow")
        finally:
            self._served -= 1
            # After a close in good order the bytes have left, and this does nothing. A peer that
            # does not read would keep the rest of its file in our memory.
            connection.abort()

    async def _answer(self, connection: Connection, request: Request) -> None:
        writer = connection.writer
        try:
            if self._served > SERVED_MAX:
                raise SnapshotMissing("too many files are being sent already")
            async with self._store.reading(request.path, request.name) as file:
                if file.bytes != request.bytes:
                    raise SnapshotMissing(
                        f"{request.name} of {request.path} has {file.bytes} bytes here, not "
                        f"{request.bytes}"
                    )
                connection.send({"bytes": file.bytes})
                # Only then: the getter reads lines up to here, and bytes from here on.
                if (await receive_object(connection)).get("go") is not True:
                    raise LinkRefused("the getter wants no bytes")
                await self._send(writer, file)
        except SnapshotMissing as refused:
            connection.send({"why": _one_line(refused)})
        async with asyncio.timeout(self._stall_seconds):
            writer.close()
            await writer.wait_closed()

    async def _send(self, writer: asyncio.StreamWriter, file: OpenSnapshot) -> None:
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
    partial: PartialFile,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Write the file `name` of checkpoint `path`, as the agent at `address` has it, into `partial`.

    Raises:
        Unreachable: nobody answers there.
        NotHeld: the source does not give the file, or not all of it, or too slowly.
        OSError: the partial file cannot be written.
    """
    try:
        endpoint = parse_host_and_port(address)
        reader, writer = await dial(endpoint, HANDSHAKE_SECONDS, limit=PIECE_BYTES)
    except (OSError, ValueError, TimeoutError) as trouble:
        raise Unreachable(f"{address} cannot be reached: {_reason(trouble)}") from None
    connection = Connection(reader, writer)
    try:
        await prove_getter(connection, secret, Request(path, name, entry.bytes))
        answer = await receive_object(connection)
        if "why" in answer:
            raise SnapshotMissing(
                f"{address} does not give {name} of {path}: {_one_line(answer['why'])}"
            )
        if answer.get("bytes") != entry.bytes:
            offered = _one_line(answer.get("bytes"))
            raise SnapshotMissing(
                f"{address} offers {offered} bytes for {name} of {path} instead of {entry.bytes}"
            )
        connection.send({"go": True})
        await _receive(
            reader,
            entry.bytes,
            partial,
            stall_seconds,
            f"{address} sent only {{}} of {name} of {path}",
        )
    except LinkRefused as refused:
        raise SnapshotMissing(f"{address} does not give {name} of {path}: {refused}") from None
    finally:
        connection.abort()


class Unreachable(SnapshotMissing):
    """Nobody answers at an address: asking it for another file is of no use."""


async def _receive(
    reader: asyncio.StreamReader, size: int, partial: PartialFile, stall_seconds: float, short: str
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
            raise SnapshotMissing(f"{short.format(f'{came} of {size} bytes')}, {why}") from None
        if written is not None:
            await written
        written = partial.write(piece)
        offset += len(piece)
    if written is not None:
        await written


# The handshake ------------------------------------------------------------------------------------


async def prove_holder(connection: Connection, secret: bytes) -> Request:
    """Prove this end to be the holder of files; returns what the getter asks for, once it has
    proved itself too. Raises `LinkRefused` if it does not know the secret."""
    greeting = await receive_object(connection)
    getter_nonce = greeting.get("nonce")
    if (
        greeting.get("transfer") != _VERSION
        or not isinstance(getter_nonce, str)
        or not NONCE_FORM.fullmatch(getter_nonce)
    ):
        raise LinkRefused("the peer does not speak this version of transfers")
    holder_nonce = make_nonce()
    proof = _proof(secret, "holder", getter_nonce, holder_nonce)
    connection.send({"nonce": holder_nonce, "proof": proof})
    asked = await receive_object(connection)
    path, name, size = asked.get("path"), asked.get("name"), asked.get("bytes")
    # The request is part of the proof: nobody on the way can ask for another file.
    proof = _proof(secret, "getter", getter_nonce, holder_nonce, path, name, size)
    if not is_same(proof, asked.get("proof")):
        raise LinkRefused("whoever asks for a file does not know this run's secret")
    if not isinstance(path, str) or not isinstance(name, str) or type(size) is not int:
        raise LinkRefused("the request is malformed")
    return Request(path, name, size)


async def prove_getter(connection: Connection, secret: bytes, request: Request) -> None:
    """Prove this end to be a getter, and ask for a file. Raises `LinkRefused` if the holder does
    not know the secret."""
    getter_nonce = make_nonce()
    connection.send({"transfer": _VERSION, "nonce": getter_nonce})
    challenge = await receive_object(connection)
    holder_nonce = challenge.get("nonce")
    if not isinstance(holder_nonce, str) or not is_same(
        _proof(secret, "holder", getter_nonce, holder_nonce), challenge.get("proof")
    ):
        raise LinkRefused("it does not know this run's secret")
    fields = (request.path, request.name, request.bytes)
    proof = _proof(secret, "getter", getter_nonce, holder_nonce, *fields)
    connection.send(
        {"proof": proof, "path": request.path, "name": request.name, "bytes": request.bytes}
    )


def _proof(secret: bytes, role: str, getter_nonce: str, holder_nonce: str, *request: Any) -> str:
    # Another first word than the link's: no proof of the one is one of the other.
    return prove(secret, "opt_train transfer", _VERSION, role, getter_nonce, holder_nonce, *request)


def _one_line(value: Any) -> str:
    """What a peer sent, or a sentence for one, as a short line for a log."""
    return " ".join(str(value).split())[:_MAX_WHY]


def _reason(trouble: BaseException) -> str:
    if isinstance(trouble, OSError) and trouble.errno and trouble.errno > 0:
        return os.strerror(trouble.errno)  # asyncio's own sentence repeats the address
    return str(trouble) or f"no answer for {HANDSHAKE_SECONDS:g} s"
