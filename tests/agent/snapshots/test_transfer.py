"""Files from one agent to another: whole and true, or one sentence and nothing; strangers get
nothing, harm nobody."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from opt_train.agent.snapshots import snapshot_file, transfer
from opt_train.agent.snapshots.partial_file import PartialFile
from opt_train.agent.snapshots.placement import SnapshotMissing
from opt_train.agent.snapshots.store import SnapshotStore
from opt_train.agent.snapshots.transfer import (
    TransferServer,
    Unreachable,
    get,
    prove_getter,
    prove_holder,
)
from opt_train.checkpoint.manifest import FileEntry
from opt_train.host.interface import address_of_interface
from opt_train.link import handshake
from opt_train.link.connection import Connection, LinkRefused
from tests.agent.snapshots.stores import (
    MEMORY,
    NODE,
    child,
    content,
    entry,
    files_below,
    memory_descriptors,
    names,
    play,
    put,
    store_in,
)

SECRET = secrets.token_bytes(32)
DATA = content(1)
STALL_SECONDS = 0.5


@contextlib.asynccontextmanager
async def served(
    source: SnapshotStore, secret: bytes = SECRET
) -> AsyncIterator[tuple[str, TransferServer]]:
    async def known() -> bytes:
        return secret

    server = TransferServer(source, known, stall_seconds=STALL_SECONDS)
    try:
        yield await server.start("127.0.0.1"), server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def pair(tmp_path: Path) -> AsyncIterator[tuple[SnapshotStore, str, SnapshotStore]]:
    """A store, the address it is served at, and another one."""
    async with (
        store_in(tmp_path / "a") as source,
        store_in(tmp_path / "b") as target,
        served(source) as (address, _),
    ):
        yield source, address, target


@contextlib.asynccontextmanager
async def impostor(
    act: Callable[[Connection, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Something at an address that does what `act` does."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(LinkRefused, OSError):
            await act(Connection(reader, writer), writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def fetch(
    target: SnapshotStore,
    address: str,
    path: str,
    name: str = "shard",
    wanted: FileEntry | None = None,
    **more: Any,
) -> None:
    wanted = wanted or entry(DATA)
    async with target.partial_file(path, name, wanted) as partial_file:
        await get(
            address, more.pop("secret", SECRET), path, name, wanted, partial_file, STALL_SECONDS
        )
        await partial_file.commit()


async def refused(target: SnapshotStore, address: str, path: str = MEMORY, **more: Any) -> str:
    """The sentence of a fetch that fails; nothing is held after it, in memory or on disk."""
    before = memory_descriptors(os.getpid())
    with pytest.raises(SnapshotMissing) as raised:
        await fetch(target, address, path, **more)
    assert not target.files()
    await target.drop("node/1.00/step-00000001")  # what was given to the helper before is done
    async with asyncio.timeout(5):
        while (
            memory_descriptors(os.getpid()) > before
        ):  # the server, of this process too, closes its own a moment later
            await asyncio.sleep(0.01)
    assert not files_below(target.folder)
    why = str(raised.value)
    assert "\n" not in why
    assert len(why) < 400
    return why


@pytest.mark.parametrize("path", [MEMORY, NODE])
@pytest.mark.parametrize("size", [0, 1, transfer.PIECE_BYTES, 10_000_000])
def test_a_file_comes_whole(tmp_path: Path, path: str, size: int) -> None:
    data = content(3, size)

    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            await put(source, path, "shard", data)
            await fetch(target, address, path, wanted=entry(data))
            assert names(target) == {path: ("shard",)}
            await source.drop(path)
            assert await target.is_good(path, "shard", entry(data))

    play(scene())


def test_memory_of_a_dead_rank_comes_whole(tmp_path: Path) -> None:
    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            with child(DATA) as rank:
                source.adopt(MEMORY, "shard", rank.pid, rank.fd, len(DATA), entry(DATA).sha256)
            await fetch(target, address, MEMORY)
            assert await target.is_good(MEMORY, "shard", entry(DATA))

    play(scene())


@pytest.mark.parametrize("path", [MEMORY, NODE])
def test_a_stale_copy_is_not_shelved(tmp_path: Path, path: str) -> None:
    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            await put(source, path, "shard", content(2))  # as long, of another step
            assert "came with other bytes than the manifest names" in await refused(
                target, address, path
            )

    play(scene())


def test_what_is_not_held_or_of_another_size_is_refused_in_a_sentence(tmp_path: Path) -> None:
    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            assert f"shard of {MEMORY} is not held" in await refused(target, address)
            await put(source, MEMORY, "shard", DATA[:-1])
            why = await refused(target, address)
            assert why.endswith(f"has {len(DATA) - 1} bytes here, not {len(DATA)}")

    play(scene())


def test_no_path_on_disk_is_made_of_a_peers_words(tmp_path: Path) -> None:
    (tmp_path / "treasure").write_text("gold")

    async def asked(address: str, path: Any, name: Any) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        await prove_getter(Connection(reader, writer), SECRET, transfer.Request(path, name, 4))
        answer = await reader.readline()
        writer.close()
        return json.loads(answer or b"{}")

    async def scene() -> None:
        async with pair(tmp_path) as (source, address, _):
            await put(source, NODE, "shard", b"data")
            up = os.path.relpath(tmp_path, source.folder / NODE)
            for path, name in [
                (NODE, f"{up}/treasure"),
                ("..", "treasure"),
                ("", str(tmp_path / "treasure")),
            ]:
                assert "is not held" in (await asked(address, path, name))["why"]
            assert await asked(address, ["a", "list"], "shard") == {}
            assert await asked(address, NODE, "shard") == {"bytes": 4}

    play(scene())


def test_whoever_does_not_know_the_secret_gets_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            await put(source, MEMORY, "shard", DATA)
            why = await refused(target, address, secret=secrets.token_bytes(32))
            assert "does not know this run's secret" in why
            # One that does not care for the server's proof fails by its own.
            reader, writer = await asyncio.open_connection(*address.split(":"))
            connection = Connection(reader, writer)
            connection.send({"transfer": 1, "nonce": "0" * 64})
            await connection.receive_line(5)
            connection.send(
                {"proof": "0" * 64, "path": MEMORY, "name": "shard", "bytes": len(DATA)}
            )
            assert await reader.read() == b""
            writer.close()

    play(scene())


def test_a_changed_request_is_not_answered(tmp_path: Path) -> None:
    async def scene() -> None:
        async with pair(tmp_path) as (source, address, _):
            await put(source, MEMORY, "shard", DATA)
            await put(source, MEMORY, "other", DATA)
            reader, writer = await asyncio.open_connection(*address.split(":"))
            connection = Connection(reader, writer)
            send = connection.send
            connection.send = lambda line: send(
                {**line, "name": "other"} if "name" in line else line
            )
            await prove_getter(connection, SECRET, transfer.Request(MEMORY, "shard", len(DATA)))
            assert await reader.read() == b""
            writer.close()

    play(scene())


def test_a_proof_of_the_supervisors_link_is_no_proof_here(tmp_path: Path) -> None:
    async def with_the_links_proof(connection: Connection, _: asyncio.StreamWriter) -> None:
        hello = json.loads(await connection.receive_line(5))
        for_link = handshake._proof(SECRET, "holder", "", 0, hello["nonce"], "1" * 64)
        connection.send({"nonce": "1" * 64, "proof": for_link})
        await connection.receive_line(5)

    async def with_its_own(connection: Connection, _: asyncio.StreamWriter) -> None:
        # What the getter will have to prove, said as the holder's proof.
        hello = json.loads(await connection.receive_line(5))
        proof = transfer._proof(SECRET, "getter", hello["nonce"], "1" * 64)
        connection.send({"nonce": "1" * 64, "proof": proof})
        await connection.receive_line(5)

    async def scene() -> None:
        async with store_in(tmp_path) as target:
            for act in (with_the_links_proof, with_its_own):
                async with impostor(act) as address:
                    assert "does not know this run's secret" in await refused(target, address)

    play(scene())


@pytest.mark.parametrize("path", [MEMORY, NODE])
def test_a_source_that_dies_in_the_middle_leaves_nothing(tmp_path: Path, path: str) -> None:
    async def act(connection: Connection, writer: asyncio.StreamWriter) -> None:
        await prove_holder(connection, SECRET)
        connection.send({"bytes": len(DATA)})
        await connection.receive_line(5)
        writer.write(DATA[: len(DATA) // 2])
        await writer.drain()

    async def scene() -> None:
        async with store_in(tmp_path) as target, impostor(act) as address:
            why = await refused(target, address, path)
            assert (
                why
                == f"{address} sent only 5000000 of {len(DATA)} bytes of shard of {path}, and was "
                "cut off"
            )

    play(scene())


@pytest.mark.parametrize("drip", [False, True])
def test_a_source_that_falls_silent_or_drips_is_given_up(tmp_path: Path, drip: bool) -> None:
    async def act(connection: Connection, writer: asyncio.StreamWriter) -> None:
        await prove_holder(connection, SECRET)
        connection.send({"bytes": len(DATA)})
        await connection.receive_line(5)
        writer.write(DATA[: transfer.PIECE_BYTES])
        for _ in range(200):
            await asyncio.sleep(0.05)
            if drip:
                writer.write(b"x")
            await writer.drain()

    async def scene() -> None:
        async with store_in(tmp_path) as target, impostor(act) as address:
            began = time.monotonic()
            assert "and then too little for 0.5 s" in await refused(target, address)
            assert time.monotonic() - began < 5

    play(scene())


@pytest.mark.parametrize("claim", [1 << 50, -1, "many", None, 10_000_001])
def test_an_oversized_claim_is_refused_before_a_byte_comes(tmp_path: Path, claim: Any) -> None:
    async def act(connection: Connection, writer: asyncio.StreamWriter) -> None:
        await prove_holder(connection, SECRET)
        connection.send({"bytes": claim})
        with pytest.raises(LinkRefused):
            await connection.receive_line(5)

    async def scene() -> None:
        async with store_in(tmp_path) as target, impostor(act) as address:
            why = await refused(target, address)
            assert why.endswith(
                f"offers {claim} bytes for shard of {MEMORY} instead of {len(DATA)}"
            )

    play(scene())


@pytest.mark.parametrize(
    "nonsense", [b"\xff\xfe\n", b"[1]\n", b"x" * 5000, b"{}\n", b'{"nonce": 5}\n', b""]
)
def test_a_source_that_talks_nonsense_is_one_sentence(tmp_path: Path, nonsense: bytes) -> None:
    async def act(connection: Connection, writer: asyncio.StreamWriter) -> None:
        writer.write(nonsense)
        await writer.drain()

    async def scene() -> None:
        async with store_in(tmp_path) as target, impostor(act) as address:
            assert "does not give shard" in await refused(target, address)

    play(scene())


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:1", "example.invalid:80", "127.0.0.1:99999"],
)
def test_nobody_there_is_one_sentence(tmp_path: Path, address: str) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as target:
            why = await refused(target, address)
            assert why.startswith(f"{address} cannot be reached: ")
            with pytest.raises(Unreachable):
                await fetch(target, address, MEMORY)

    play(scene())


def test_strangers_do_not_keep_an_honest_agent_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STRANGERS_MAX", 20)
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 2.0)
    monkeypatch.setattr(transfer, "ADMISSION_SECONDS", 4.0)

    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            await put(source, MEMORY, "shard", DATA)
            strangers = [await asyncio.open_connection(*address.split(":")) for _ in range(40)]
            for number, (_, writer) in enumerate(strangers):
                writer.write(
                    [b"", b"\xff\x00\n", b"y" * 100_000, b'{"transfer": 1, "nonce": "short"}\n'][
                        number % 4
                    ]
                )
            began = time.monotonic()
            await asyncio.gather(
                *(reader.read() for reader, _ in strangers[:20]), return_exceptions=True
            )
            assert time.monotonic() - began < 1.5, "more strangers were let in than have room"
            for reader, writer in strangers:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            await fetch(target, address, MEMORY)

    play(scene())


def test_a_getter_that_does_not_read_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(1, 30_000_000)  # more than the sockets' buffers hold
    caplog.set_level(logging.INFO)

    async def scene() -> None:
        async with store_in(tmp_path) as source, served(source) as (address, server):
            for path in (MEMORY, NODE):
                await put(source, path, "shard", data)
                host, port = address.split(":")
                with socket.create_connection((host, int(port))) as deaf:
                    deaf.setblocking(False)
                    reader, writer = await asyncio.open_connection(sock=deaf.dup(), limit=1 << 10)
                    connection = Connection(reader, writer)
                    await prove_getter(
                        connection, SECRET, transfer.Request(path, "shard", len(data))
                    )
                    await connection.receive_line(5)
                    connection.send({"go": True})
                    began = time.monotonic()
                    while server._served and time.monotonic() - began < 10:
                        await asyncio.sleep(0.05)
                    assert not server._served, "it waits for a peer that does not read"
                    assert caplog.messages[-1] == "a transfer ended: the peer was too slow"
                    writer.close()

    play(scene())


def test_a_file_that_is_dropped_while_it_is_sent_arrives(tmp_path: Path) -> None:
    async def scene() -> None:
        async with pair(tmp_path) as (source, address, _):
            for path in (MEMORY, NODE):
                await put(source, path, "shard", DATA)
                reader, writer = await asyncio.open_connection(*address.split(":"))
                connection = Connection(reader, writer)
                await prove_getter(connection, SECRET, transfer.Request(path, "shard", len(DATA)))
                assert json.loads(await connection.receive_line(5)) == {"bytes": len(DATA)}
                await source.drop(path)
                connection.send({"go": True})
                assert await reader.read() == DATA
                writer.close()

    play(scene())


def test_memory_stays_flat_while_a_large_file_comes_faster_than_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(1, 100_000_000)
    append = PartialFile._append

    def slowly(partial_file: PartialFile, piece: bytes) -> int:
        time.sleep(0.01)
        return append(partial_file, piece)

    def resident() -> int:
        """Bytes of this process alone, without files in memory."""
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    async def scene() -> None:
        async with pair(tmp_path) as (source, address, target):
            await put(source, MEMORY, "shard", data)
            wanted = entry(data)
            monkeypatch.setattr(PartialFile, "_append", slowly)
            before, most = resident(), 0
            getting = asyncio.create_task(fetch(target, address, MEMORY, wanted=wanted))
            while not getting.done():
                most = max(most, resident())
                await asyncio.sleep(0.01)
            await getting
            assert most - before < 30_000_000

    play(scene())


def test_an_interfaces_address_is_found() -> None:
    assert address_of_interface("lo") == "127.0.0.1"
    assert address_of_interface("no-such-0,lo") == "127.0.0.1"
    with pytest.raises(
        OSError, match=r"no network interface 'no-such-0' with an IPv4 address; there are: .*lo"
    ):
        address_of_interface("no-such-0")


def test_a_piece_on_the_way_is_no_larger_than_one_that_is_written() -> None:
    assert transfer.PIECE_BYTES <= snapshot_file.PIECE_BYTES
