"""Real agents that hold what real ranks took: through the death of ranks, of agents and of
peers."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.snapshots import transfer
from opt_train.agent.snapshots.service import STATE_BYTES_MAX, SnapshotService
from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import commit_manifest
from opt_train.checkpoint.manifest import Manifest
from opt_train.protocol.commands import Begin, Drop, Fetch, Kill, Leave
from opt_train.protocol.facts import (
    Fetched,
    HeldFiles,
    MemoryFile,
    RankExited,
    SavedFile,
    SnapshotHeld,
    SnapshotTaken,
)
from opt_train.protocol.framing import Message
from opt_train.supervisor.inputs import AgentConnected, FactReceived
from tests.agent.harness import SupervisorEnd, begin, make_run, start_agent
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
)

pytestmark = pytest.mark.timeout(90)
STATE = json.dumps({"step": 5, "healthy": True, "counters": {"tokens": 1 << 40}}).encode()
FILES = {"shard-00001.safetensors": content(1, 5_000_000), "state.json": STATE}
SHARD = "shard-00001.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The disk of all nodes of the test: each has its own folder there."""
    return tmp_path / "disk"


@pytest.fixture
def run(tmp_path: Path, disk: Path) -> RunDirectory:
    """A run whose ranks take snapshots."""
    made = make_run(tmp_path, orphan_seconds=30.0)
    config = json.loads(made.config_json.read_text())
    config["cluster"]["rank_module"] = "snapshots.snapshot_rank"
    config["checkpoint"] = {"memory_every_steps": 5, "node_directory": str(disk)}
    made.config_json.write_text(json.dumps(config))
    return made


def commit(run: RunDirectory, path: str, files: dict[str, bytes] = FILES) -> str:
    """Write the manifest of a held checkpoint, as the supervisor does; returns its sha256."""
    folder = run.path / path
    folder.mkdir(parents=True, exist_ok=True)
    return commit_manifest(
        folder, Manifest("1.00", 5, {name: entry(data) for name, data in files.items()}, {})
    )


def to_fetch(
    run: RunDirectory, path: str = MEMORY, source: str = "", origin: str = "", **more: Any
) -> Fetch:
    wanted = more.pop("names", tuple(FILES))
    sources = dict.fromkeys(wanted, source) if source else {}
    return Fetch(path, commit(run, path, **more), wanted, sources, origin)


def snapshot_of(
    run: RunDirectory, node: str = "node-1", files: dict[str, bytes] = FILES, generation: int = 1
) -> Begin:
    made = begin(run, generation, files={name: data.hex() for name, data in files.items()}, step=5)
    values = {field: getattr(made, field) for field in made.__dataclass_fields__}
    return Begin(**{**values, "node": node, "attempt": "1.00"})


async def fetched(listener: SupervisorEnd, node: str, command: Fetch) -> Fetched:
    """The next answer to `command`."""
    before = len(listener.told)
    listener.server.send(node, command)
    return await listener.until(
        lambda: next(
            (
                i.fact
                for i in listener.told[before:]
                if isinstance(i, FactReceived) and isinstance(i.fact, Fetched) and i.node == node
            ),
            None,
        )
    )


@contextlib.asynccontextmanager
async def agents(
    run: RunDirectory, *nodes: str
) -> AsyncIterator[tuple[SupervisorEnd, dict[str, subprocess.Popen[bytes]]]]:
    """Agents of `nodes`, each with one slot, and who leads them; they leave at the end, in good
    order."""
    started = {node: start_agent(run, node) for node in nodes}
    try:
        async with SupervisorEnd(run) as listener:
            for node in nodes:
                await listener.connected(node)
            yield listener, started
            for node, agent in started.items():
                await listener.until(lambda node=node: node in listener.server.connected)
                listener.server.send(node, Leave("the test is over"))
                await listener.until(lambda agent=agent: agent.poll() is not None)
                assert agent.returncode == 0
    finally:
        for agent in started.values():
            agent.kill()
            agent.wait()


async def snapshot_held(
    listener: SupervisorEnd, run: RunDirectory, node: str = "node-1"
) -> SnapshotHeld:
    listener.server.send(node, snapshot_of(run, node))
    return await listener.fact(SnapshotHeld)


def log_of(run: RunDirectory, node: str = "node-1") -> str:
    return (run.nodes / node / "agent.log").read_text()


# Snapshots ----------------------------------------------------------------------------------------


def test_a_snapshot_outlives_its_rank_and_can_be_restored(run: RunDirectory, disk: Path) -> None:
    async def scene() -> None:
        async with agents(run, "node-1") as (listener, _):
            held = await snapshot_held(listener, run)
            assert (held.generation, held.attempt, held.rank, held.step, held.seconds) == (
                1,
                "1.00",
                0,
                5,
                0.5,
            )
            assert held.files == tuple(
                SavedFile(n, len(d), entry(d).sha256) for n, d in FILES.items()
            )
            assert held.state == json.loads(STATE)
            assert not listener.facts(SnapshotTaken), (
                "what a rank says to its agent alone was relayed"
            )
            listener.server.send("node-1", Kill(1, stacks=False))
            await listener.fact(RankExited)
            command = to_fetch(run)
            answer = await fetched(listener, "node-1", command)
            assert (answer.path, answer.names, answer.why) == (MEMORY, tuple(FILES), "")
            restored = manifests.verify(Path(answer.folder), command.manifest_sha256)
            assert restored.step == 5
            assert (Path(answer.folder) / SHARD).read_bytes() == FILES[SHARD]
            # The next connection begins with what is held.
            listener.server._current["node-1"].close()
            await listener.until(
                lambda: len([i for i in listener.told if isinstance(i, AgentConnected)]) == 2
            )
            state = (await listener.connected()).state
            assert state.held == (HeldFiles(MEMORY, tuple(sorted(FILES))),)
            assert state.address.startswith("127.0.0.1:")
        assert not list(disk.iterdir()), "an agent that held nothing on disk left something there"

    play(scene())


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "codec can't decode"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply"),
        (b'{"a": "' + b"x" * STATE_BYTES_MAX + b'"}', "bytes; 262144 at most were expected"),
        (None, "state.json of memory/1.00/step-00000005 is not in memory"),
    ],
)
def test_a_state_that_nobody_could_read_makes_no_snapshot(
    run: RunDirectory, state: bytes | None, why: str
) -> None:
    files = {SHARD: FILES[SHARD]} if state is None else {**FILES, "state.json": state}

    async def scene() -> None:
        async with agents(run, "node-1") as (listener, started):
            listener.server.send("node-1", snapshot_of(run, files=files))
            await listener.until(lambda: "is not held: " in log_of(run))
            assert why in log_of(run)
            await listener.until(lambda: memory_descriptors(started["node-1"].pid) == 0)
            listener.server.send("node-1", Kill(1, stacks=False))
            await listener.fact(RankExited)
            assert not listener.facts(SnapshotHeld)

    play(scene())


def in_process(
    scene: Callable[[SnapshotService, list[Message]], Coroutine[Any, Any, None]],
    run: RunDirectory,
    disk: Path,
) -> None:
    """Play with a `SnapshotService` of this process, as "node-1", and the facts it has reported."""

    async def played() -> None:
        facts: list[Message] = []
        service = SnapshotService(run, "node-1", str(disk), facts.append, asyncio.create_task)
        await service.open(True, "lo")
        try:
            await scene(service, facts)
        finally:
            await service.close()
        assert not [name for name in files_below(disk) if "/node/1.00/" not in name]

    disk.mkdir(exist_ok=True)
    play(played())


async def next_fact(facts: list[Message], count: int = 1) -> Message:
    while len(facts) < count:
        await asyncio.sleep(0.01)
    return facts[count - 1]


def taken(rank: Any, data: bytes, name: str = SHARD) -> SnapshotTaken:
    return SnapshotTaken(5, (MemoryFile(name, len(data), entry(data).sha256, rank.fd),), 0.1)


def of_rank(run: RunDirectory, rank: int) -> Begin:
    made = begin(run, rank=rank)
    return Begin(
        **{
            **{field: getattr(made, field) for field in made.__dataclass_fields__},
            "attempt": "1.00",
        }
    )


def test_a_rank_that_is_gone_already_has_no_snapshot(run: RunDirectory, disk: Path) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        with child(b"data") as rank:
            rank.kill()
            service.keep(rank.pid, of_rank(run, 1), taken(rank, b"data"))
        assert not facts
        assert not service.files()

    in_process(scene, run, disk)


@pytest.mark.parametrize("name", ["../../escape", "manifest.json", "a/b", ""])
def test_a_rank_cannot_name_a_file_that_is_none(run: RunDirectory, disk: Path, name: str) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        with child(b"data") as rank:
            service.keep(rank.pid, of_rank(run, 1), taken(rank, b"data", name))
        assert not facts
        assert not service.files()

    in_process(scene, run, disk)


def test_only_rank_0_tells_a_state(run: RunDirectory, disk: Path) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        with child(b"data") as rank:
            service.keep(rank.pid, of_rank(run, 1), taken(rank, b"data"))
        assert isinstance(facts[0], SnapshotHeld)
        assert facts[0].state is None

    in_process(scene, run, disk)


def test_a_state_with_other_bytes_than_said_makes_no_snapshot(
    run: RunDirectory, disk: Path
) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        with child(b'{"step": 5}') as rank:
            fact = SnapshotTaken(
                5, (MemoryFile("state.json", 11, entry(b"{}").sha256, rank.fd),), 0.1
            )
            service.keep(rank.pid, of_rank(run, 0), fact)
        assert not facts
        assert not service.files()

    in_process(scene, run, disk)


# Between two nodes --------------------------------------------------------------------------------


def test_a_partners_copy_outlives_the_agent_that_took_it(run: RunDirectory, disk: Path) -> None:
    async def scene() -> None:
        async with agents(run, "node-1", "node-2") as (listener, started):
            await snapshot_held(listener, run)
            address = (await listener.connected("node-1")).state.address
            answer = await fetched(listener, "node-2", to_fetch(run, source=address))
            assert answer.why == ""
            started["node-1"].kill()
            started["node-1"].wait()
            answer = await fetched(listener, "node-2", to_fetch(run))
            assert answer.why == ""
            manifests.verify(Path(answer.folder), commit(run, MEMORY))
            # A node that comes anew gets it back from its partner.
            started["node-1"] = start_agent(run, "node-1")
            back = (await listener.connected("node-2")).state.address
            await listener.until(
                lambda: len([i for i in listener.told if isinstance(i, AgentConnected)]) == 3
            )
            assert not (await listener.connected("node-1")).state.held
            answer = await fetched(listener, "node-1", to_fetch(run, source=back))
            assert answer.why == ""
            manifests.verify(Path(answer.folder), commit(run, MEMORY))
        assert not list(disk.iterdir())

    play(scene())


def test_a_source_that_is_gone_is_one_sentence_and_what_can_be_had_is_held(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        async with agents(run, "node-1", "node-2") as (listener, started):
            await snapshot_held(listener, run)
            address = (await listener.connected("node-1")).state.address
            answer = await fetched(
                listener, "node-2", to_fetch(run, source=address, names=(SHARD,))
            )
            assert answer.why == ""
            started["node-1"].kill()
            started["node-1"].wait()
            answer = await fetched(listener, "node-2", to_fetch(run, source=address))
            assert answer.why == f"{address} cannot be reached: Connection refused"
            assert answer.folder == ""
            del started["node-1"]
            assert memory_descriptors(started["node-2"].pid) == 1, (
                "what was held went with what could not be had"
            )

    play(scene())


def test_a_snapshot_that_its_rank_writes_over_is_copied_by_nobody(run: RunDirectory) -> None:
    async def scene() -> None:
        async with agents(run, "node-1", "node-2") as (listener, _):
            await snapshot_held(listener, run)
            rank = listener.slot()
            assert rank is not None
            for number in os.listdir(f"/proc/{rank.pid}/fd"):
                if SHARD in os.readlink(f"/proc/{rank.pid}/fd/{number}"):
                    with open(f"/proc/{rank.pid}/fd/{number}", "r+b") as memory:
                        memory.write(b"the next snapshot")
            address = (await listener.connected("node-1")).state.address
            answer = await fetched(listener, "node-2", to_fetch(run, source=address))
            assert (
                answer.why == f"{SHARD} of {MEMORY} came with other bytes than the manifest names"
            )
            answer = await fetched(listener, "node-1", to_fetch(run, NODE, origin=MEMORY))
            assert (
                answer.why
                == f"{SHARD} of {NODE} is not held here, and nobody was named who holds it"
            )
            answer = await fetched(listener, "node-1", to_fetch(run))
            assert (
                answer.why
                == f"{SHARD} of {MEMORY} is not held here, and nobody was named who holds it"
            )

    play(scene())


def test_dropped_snapshots_free_the_agents_memory(run: RunDirectory) -> None:
    async def scene() -> None:
        async with agents(run, "node-1", "node-2") as (listener, started):
            await snapshot_held(listener, run)
            address = (await listener.connected("node-1")).state.address
            assert (await fetched(listener, "node-2", to_fetch(run, source=address))).why == ""
            for node, agent in started.items():
                assert memory_descriptors(agent.pid) == len(FILES)
                listener.server.send(node, Drop(MEMORY))
                await listener.until(lambda agent=agent: memory_descriptors(agent.pid) == 0)

    play(scene())


# On the node's disk -------------------------------------------------------------------------------


def test_a_new_agent_finds_on_disk_what_a_killed_one_left(run: RunDirectory, disk: Path) -> None:
    async def scene() -> None:
        async with agents(run, "node-1") as (listener, started):
            await snapshot_held(listener, run)
            answer = await fetched(listener, "node-1", to_fetch(run, NODE, origin=MEMORY))
            assert answer.why == ""
            started["node-1"].kill()
            started["node-1"].wait()
            assert Path(answer.folder).exists()
            started["node-1"] = start_agent(run, "node-1")
            await listener.until(
                lambda: len([i for i in listener.told if isinstance(i, AgentConnected)]) == 2
            )
            assert (await listener.connected()).state.held == (
                HeldFiles(NODE, tuple(sorted(FILES))),
            )
            assert not Path(answer.folder).exists(), "links to files of a dead process"
            answer = await fetched(listener, "node-1", to_fetch(run, NODE))
            assert answer.why == ""
            manifests.verify(Path(answer.folder), commit(run, NODE))
        assert {Path(name).name for name in files_below(disk)} == set(FILES)

    play(scene())


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_held(
    run: RunDirectory, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", small],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")

    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        for name, data in FILES.items():
            await put(service.store, MEMORY, name, data)
        service.fetch(to_fetch(run, NODE, origin=MEMORY))
        answer = await next_fact(facts)
        assert isinstance(answer, Fetched)
        assert answer.why == f"{SHARD} of {NODE} cannot be written: No space left on device"
        assert names(service.store) == {MEMORY: tuple(sorted(FILES)), NODE: ("state.json",)}
        service.drop(Drop(NODE))
        service.fetch(to_fetch(run))
        answer = await next_fact(facts, 2)
        assert isinstance(answer, Fetched)
        assert answer.why == ""

    try:
        in_process(scene, run, small)
    finally:
        subprocess.run(["umount", small], check=True)


# Commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"manifest_sha256": "0" * 64}, "is not the manifest that was committed"),
        ({"path": "memory/1.00/step-00000006"}, "manifest.json is missing"),
        ({"path": "../1.00/step-00000005"}, "is no checkpoint that agents hold"),
        ({"names": ("../secret",)}, "is no name of a checkpoint's file"),
        ({"names": ("shard-9.safetensors",)}, "names no file 'shard-9.safetensors'"),
        ({"sources": dict.fromkeys(FILES, "nowhere")}, "nowhere cannot be reached"),
        ({}, "nobody was named who holds it (1 more files are missing)"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(
    run: RunDirectory, disk: Path, change: dict[str, Any], why: str
) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        made = to_fetch(run)
        command = Fetch(
            **{**{field: getattr(made, field) for field in made.__dataclass_fields__}, **change}
        )
        service.fetch(command)
        answer = await next_fact(facts)
        assert isinstance(answer, Fetched)
        assert why in answer.why
        assert (answer.path, answer.names, answer.folder) == (command.path, command.names, "")
        assert not service.files()

    in_process(scene, run, disk)


def test_a_manifest_that_this_node_sees_late_is_waited_for(run: RunDirectory, disk: Path) -> None:
    """A shared file system may show to one node a moment later what another one has renamed."""

    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        for name, data in FILES.items():
            await put(service.store, MEMORY, name, data)
        command = to_fetch(run)
        manifest = run.path / MEMORY / "manifest.json"
        late = manifest.rename(run.path / "late")
        service.fetch(command)
        await asyncio.sleep(0.5)
        assert not facts
        late.rename(manifest)
        answer = await next_fact(facts)
        assert isinstance(answer, Fetched)
        assert answer.why == ""

    in_process(scene, run, disk)


def test_not_all_nodes_ask_the_same_one_first(
    run: RunDirectory, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"shard-{rank:05d}.safetensors": content(rank, 1000) for rank in range(5)}
    shards = list(files)
    asked = []

    async def get(address: str, secret: bytes, path: str, name: str, *_: Any) -> None:
        asked.append(name)

    monkeypatch.setattr(transfer, "get", get)

    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        for name in shards[2:4]:
            await put(service.store, MEMORY, name, files[name])
        service.fetch(to_fetch(run, source="10.0.0.1:1", names=tuple(shards), files=files))
        await next_fact(facts)
        assert asked == [shards[4], shards[0], shards[1]]

    in_process(scene, run, disk)


@contextlib.contextmanager
def mute() -> Any:
    """An address where somebody listens and says nothing; yields it and the socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}", server


def test_a_fetch_under_way_is_not_begun_twice_and_a_drop_ends_it(
    run: RunDirectory, disk: Path
) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        with mute() as (address, server):
            server.setblocking(False)
            command = to_fetch(run, NODE, source=address)
            for _ in range(3):
                service.fetch(command)
            loop = asyncio.get_running_loop()
            caller, _ = await loop.sock_accept(server)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await loop.sock_accept(server)
            service.drop(Drop(NODE))
            with caller:
                caller.settimeout(5)
                while await asyncio.to_thread(caller.recv, 1000):
                    pass  # until it is closed
        assert not facts
        assert not service.files()
        for name, data in FILES.items():
            await put(service.store, NODE, name, data)
        service.fetch(command)
        answer = await next_fact(facts)
        assert isinstance(answer, Fetched)
        assert answer.why == ""
        # Done before: it is answered again, once for those that came while it was under way.
        wanted = [command, command, Fetch(NODE, command.manifest_sha256, (SHARD,), {}), command]
        for again in wanted:
            service.fetch(again)
        assert await next_fact(facts, 2) == answer
        last = await next_fact(facts, 3)
        assert isinstance(last, Fetched)
        assert last.names == (SHARD,)
        service.drop(Drop(NODE))

    in_process(scene, run, disk)


def test_another_fetch_of_the_same_checkpoint_waits_and_both_are_answered(
    run: RunDirectory, disk: Path
) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        for name, data in FILES.items():
            await put(service.store, MEMORY, name, data)
        for wanted in ((SHARD,), ("state.json",)):
            service.fetch(to_fetch(run, names=wanted))
        await next_fact(facts, 2)
        folders = set()
        for fact, wanted in zip(facts, ((SHARD,), ("state.json",)), strict=True):
            assert isinstance(fact, Fetched)
            assert (fact.names, fact.why) == (wanted, "")
            folders.add(fact.folder)
        assert files_below(Path(folders.pop())) == {*FILES, "manifest.json"}
        assert not folders

    in_process(scene, run, disk)


def test_an_agent_of_a_run_without_snapshots_listens_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path, orphan_seconds=30.0)

    async def scene() -> None:
        async with agents(run, "node-1") as (listener, _):
            state = (await listener.connected()).state
            assert (state.held, state.address) == ((), "")

    play(scene())
