"""Strangers at the supervisor's door, by Unix socket and TCP: they get nothing, and harm nobody
else."""

import asyncio
import json
import os
import secrets
import stat
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.link import connection as link
from opt_train.link import endpoint, handshake
from opt_train.link.address import Address, publish, read_address
from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import UnixEndpoint, dial, make_socket_path, remove_socket
from opt_train.link.handshake import prove_agent
from opt_train.link.secret import SecretUnusable, ensure_secret, read_secret
from opt_train.protocol.commands import LeaderLease
from opt_train.protocol.facts import AgentState, Heartbeat
from opt_train.protocol.framing import MAX_MESSAGE_BYTES, to_line
from opt_train.supervisor.inputs import AgentConnected, AgentDisconnected, HeartbeatReceived
from opt_train.supervisor.shell import agent_server as server
from tests.agent.harness import SupervisorEnd

STATE = AgentState("node-1", 1, ())


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """Whatever a stranger may try, it fares the same by both ways in."""
    return str(request.param)


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(40):
            await scene

    asyncio.run(bounded())


async def connect(listener: SupervisorEnd) -> Connection:
    return Connection(*await dial(listener.endpoint, 5))


async def join(listener: SupervisorEnd, node: str = "node-1") -> Connection:
    """An honest agent."""
    connection = await connect(listener)
    await prove_agent(connection, read_secret(listener.run.secret), node, 0)
    connection.send(AgentState(node, 1, ()))
    assert await connection.receive(5) == LeaderLease(listener.leader)
    return connection


async def is_cut_off(connection: Connection) -> bool:
    try:
        while True:
            await connection.receive_line(10)
    except LinkRefused as refused:
        return "silent" not in str(refused)


async def still_serves(listener: SupervisorEnd, connection: Connection) -> None:
    """The honest agent's link works, and nobody else is connected."""
    before = len(listener.inputs)
    connection.send(Heartbeat(()))
    await listener.until(
        lambda: [i for i in listener.inputs[before:] if isinstance(i, HeartbeatReceived)]
    )
    assert listener.server.connected == {"node-1"}


def test_both_sides_prove_themselves_and_talk(run: RunDirectory, transport: str) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            connection = await join(listener)
            assert connection.leader == listener.leader
            await still_serves(listener, connection)
            connection.close()
            await listener.until(
                lambda: [i for i in listener.inputs if isinstance(i, AgentDisconnected)]
            )

    play(scene())


def test_an_agent_with_another_secret_is_not_let_in(run: RunDirectory, transport: str) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            honest = await join(listener)
            stranger = await connect(listener)
            with pytest.raises(LinkRefused, match="does not know this run's secret"):
                await prove_agent(stranger, secrets.token_bytes(32), "node-1", 0)
            # One that does not check the supervisor's proof comes no further.
            rude = await connect(listener)
            rude.send({"link": 1, "node": "node-1", "nonce": secrets.token_hex(32)})
            await rude.receive_line(5)
            rude.send({"proof": secrets.token_hex(32)})
            assert await is_cut_off(rude)
            await still_serves(listener, honest)

    play(scene())


def test_an_agent_does_not_obey_a_supervisor_with_another_secret(
    run: RunDirectory, transport: str, tmp_path: Path
) -> None:
    async def scene() -> None:
        other = RunDirectory(tmp_path / "other")
        other.path.mkdir()
        async with SupervisorEnd(other, transport=transport) as impostor:
            connection = await connect(impostor)
            with pytest.raises(LinkRefused, match="does not know this run's secret"):
                await prove_agent(connection, read_secret(run.secret), "node-1", 0)

    play(scene())


def test_a_recorded_handshake_is_worth_nothing(run: RunDirectory, transport: str) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            recorded: list[bytes] = []
            honest = await connect(listener)
            send = honest.send
            # A wire tap.
            tap = lambda m: (recorded.append(to_line(m)), send(m))[1]  # noqa: E731
            honest.send = tap  # type: ignore[method-assign]
            await prove_agent(honest, read_secret(run.secret), "node-1", 0)
            send(STATE)
            await honest.receive(5)
            reader, writer = await dial(listener.endpoint, 5)
            writer.write(b"".join(recorded) + to_line(AgentState("node-1", 666, ())))
            assert await is_cut_off(Connection(reader, writer))
            assert [i.state.pid for i in listener.inputs if isinstance(i, AgentConnected)] == [1]
            await still_serves(listener, honest)

    play(scene())


def test_the_supervisors_own_proof_does_not_serve_as_an_agents(
    run: RunDirectory, transport: str
) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            mirror = await connect(listener)
            mirror.send({"link": 1, "node": "node-1", "nonce": secrets.token_hex(32)})
            challenge = json.loads(await mirror.receive_line(5))
            mirror.send({"proof": challenge["proof"]})
            assert await is_cut_off(mirror)
            assert not listener.inputs

    play(scene())


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95cposix\nsystem\n",
        b"[" * 900 + b"\n",
        b'{"link": 1, "node": "../../etc", "nonce": "00"}\n',
        b'{"link": 1, "node": "node-1", "nonce": ["x"]}\n',
        b"x" * (1 << 20),
        b'{"link": 1, "node": "node-1", "nonce": "' + b"a" * 64 + b'"}\n{"proof": "\xc3\xa9"}\n',
    ],
    ids=["http", "pickle", "nesting", "path", "types", "overlong", "proof"],
)
def test_garbage_before_the_proof_ends_that_connection_alone(
    run: RunDirectory, transport: str, junk: bytes
) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            honest = await join(listener)
            reader, writer = await dial(listener.endpoint, 5)
            writer.write(junk)
            assert await is_cut_off(Connection(reader, writer))
            await still_serves(listener, honest)

    play(scene())


@pytest.mark.parametrize(
    "junk",
    [
        b"not json\n",
        b'{"kind":"evil"}\n',
        b"z" * (MAX_MESSAGE_BYTES + 2),
        to_line(LeaderLease(99)),
        b'{"kind":"rank_fact","generation":1,"attempt":"1.00","rank":0,'
        b'"fact":{"kind":"metrics","line":{"step":"x"}}}\n',
        (b'{"kind":"told","number":1,"fact":' * 400) + b"{}" + b"}" * 400 + b"\n",
    ],
    ids=["text", "kind", "overlong", "command", "metrics", "nested"],
)
def test_garbage_of_a_proven_agent_ends_its_link_and_it_may_dial_again(
    run: RunDirectory, transport: str, junk: bytes
) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            honest = await join(listener, "node-1")
            reader, writer = await dial(listener.endpoint, 5)
            broken = Connection(reader, writer)
            await prove_agent(broken, read_secret(run.secret), "node-2", 0)
            broken.send(AgentState("node-2", 1, ()))
            writer.write(junk)
            assert await is_cut_off(broken)
            await listener.until(lambda: AgentDisconnected("node-2") in listener.inputs)
            await still_serves(listener, honest)
            (await join(listener, "node-2")).close()

    play(scene())


def test_a_node_of_another_run_or_with_anothers_name_is_refused(
    run: RunDirectory, transport: str
) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            for proved, stated in (("node-9", "node-9"), ("node-1", "node-2")):
                connection = await connect(listener)
                await prove_agent(connection, read_secret(run.secret), proved, 0)
                connection.send(AgentState(stated, 1, ()))
                assert await is_cut_off(connection)
            assert not listener.inputs

    play(scene())


def test_dawdlers_and_silent_ones_do_not_keep_others_out(
    run: RunDirectory, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 3.0)
    monkeypatch.setattr(server, "ADMISSION_SECONDS", 6.0)

    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            silent = [await connect(listener) for _ in range(100)]
            reader, writer = await dial(listener.endpoint, 5)
            honest = await join(listener)

            async def dawdle() -> None:
                for byte in b'{"link": 1, "node": "node-1"' * 10:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.1)

            dawdling = asyncio.create_task(dawdle())
            assert all(await asyncio.gather(*(is_cut_off(c) for c in silent)))
            assert await is_cut_off(Connection(reader, writer)), (
                "a byte now and then held the door open"
            )
            dawdling.cancel()
            await still_serves(listener, honest)

    play(scene())


def test_a_crowd_that_stands_silent_at_the_door_makes_room(
    run: RunDirectory, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many strangers as have room kept every agent out until their time was over."""
    monkeypatch.setattr(server, "STRANGERS_MAX", 16)

    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            silent = [await connect(listener) for _ in range(64)]
            async with asyncio.timeout(2):
                honest = await join(listener)
            assert all(await asyncio.gather(*(is_cut_off(c) for c in silent[:40])))
            await still_serves(listener, honest)

    play(scene())


def test_a_newer_connection_of_a_node_replaces_the_older(run: RunDirectory, transport: str) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            older = await join(listener)
            newer = await join(listener)
            assert await is_cut_off(older)
            await still_serves(listener, newer)
            assert not [i for i in listener.inputs if isinstance(i, AgentDisconnected)], (
                "the node was never away"
            )

    play(scene())


def test_an_agent_that_does_not_read_does_not_fill_the_supervisors_memory(
    run: RunDirectory, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MAX_UNSENT_BYTES", 1 << 20)

    async def scene() -> None:
        async with SupervisorEnd(run, transport=transport) as listener:
            stuck = await join(listener, "node-2")
            honest = await join(listener, "node-1")
            # The test plays a stuck process.
            stuck._reader._transport.pause_reading()  # type: ignore[attr-defined]
            sent = 0
            while listener.server.send("node-2", Heartbeat(())) and sent < 200_000:
                sent += 1
            assert sent < 200_000
            await listener.until(lambda: "node-2" not in listener.server.connected)
            await still_serves(listener, honest)

    play(scene())


def test_the_socket_is_for_this_user_alone_and_goes_with_its_folder(run: RunDirectory) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run) as listener:
            assert isinstance(listener.endpoint, UnixEndpoint)
            assert stat.S_IMODE(listener.endpoint.path.stat().st_mode) == 0o600
            assert stat.S_IMODE(listener.endpoint.path.parent.stat().st_mode) == 0o700
            published = read_address(run.supervisor_address)
            assert published == Address(listener.endpoint, listener.leader)
        assert not listener.endpoint.path.parent.exists()

    play(scene())


def test_a_deep_temporary_folder_does_not_make_the_socket_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(endpoint.tempfile, "gettempdir", lambda: str(deep))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    socket = make_socket_path()
    try:
        assert len(os.fsencode(socket)) < 108
    finally:
        remove_socket(socket)


def test_the_secret_is_made_once_and_refused_when_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    made = ensure_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_secret(path) == made
    assert list(tmp_path.iterdir()) == [path]
    path.chmod(0o640)
    with pytest.raises(SecretUnusable, match="chmod 600"):
        read_secret(path)


def test_publishing_replaces_the_address_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "supervisor.json"
    for leader in (1, 2):
        publish(path, Address(UnixEndpoint(Path("/tmp/opt-train-x/supervisor.sock")), leader))
        assert read_address(path) == Address(
            UnixEndpoint(Path("/tmp/opt-train-x/supervisor.sock")), leader
        )
    assert list(tmp_path.iterdir()) == [path]
