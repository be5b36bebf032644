"""What an agent does with snapshots, in one process: it keeps what a rank has taken and fetches
what is commanded; what cannot be is one sentence, and costs nothing."""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.snapshots import transfer
from opt_train.agent.snapshots.service import SnapshotService
from opt_train.protocol.commands import Drop, Fetch
from opt_train.protocol.facts import (
    Fetched,
    MemoryFile,
    SnapshotStored,
    SnapshotTaken,
)
from opt_train.protocol.framing import Message
from tests.agent.snapshots.commands import (
    FILES,
    SHARD,
    of_rank,
    taken,
    to_fetch,
)
from tests.agent.snapshots.stores import (
    MEMORY,
    NODE,
    child,
    content,
    entry,
    files_below,
    names,
    play,
    put,
)


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


@contextlib.contextmanager
def mute() -> Any:
    """An address where somebody listens and says nothing; yields it and the socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}", server


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


def test_only_rank_0_reports_a_state(run: RunDirectory, disk: Path) -> None:
    async def scene(service: SnapshotService, facts: list[Message]) -> None:
        with child(b"data") as rank:
            service.keep(rank.pid, of_rank(run, 1), taken(rank, b"data"))
        assert isinstance(facts[0], SnapshotStored)
        assert facts[0].state is None

    in_process(scene, run, disk)


def test_a_state_with_other_bytes_than_claimed_makes_no_snapshot(
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
