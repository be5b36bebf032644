"""Real agents that keep what real ranks took: through the death of ranks, agents and peers."""

import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.snapshots.service import STATE_BYTES_MAX
from opt_train.checkpoint import manifest as manifests
from opt_train.protocol.commands import Drop, Fetch, Kill, Leave
from opt_train.protocol.facts import (
    Fetched,
    RankExited,
    SavedFile,
    SnapshotFiles,
    SnapshotStored,
    SnapshotTaken,
)
from opt_train.supervisor.inputs import AgentConnected, FactReceived
from tests.agent.harness import SupervisorEnd, make_run, start_agent
from tests.agent.snapshots.commands import FILES, SHARD, STATE, commit, snapshot_of, to_fetch
from tests.agent.snapshots.stores import (
    MEMORY,
    NODE,
    entry,
    files_below,
    memory_descriptors,
    play,
)


async def fetched(listener: SupervisorEnd, node: str, command: Fetch) -> Fetched:
    """The next answer to `command`."""
    before = len(listener.inputs)
    listener.server.send(node, command)
    return await listener.until(
        lambda: next(
            (
                i.fact
                for i in listener.inputs[before:]
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
) -> SnapshotStored:
    listener.server.send(node, snapshot_of(run, node))
    return await listener.fact(SnapshotStored)


def log_of(run: RunDirectory, node: str = "node-1") -> str:
    return (run.nodes / node / "agent.log").read_text()


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
                "what a rank reports to its agent only was relayed"
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
                lambda: len([i for i in listener.inputs if isinstance(i, AgentConnected)]) == 2
            )
            state = (await listener.connected()).state
            assert state.held == (SnapshotFiles(MEMORY, tuple(sorted(FILES))),)
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
            assert not listener.facts(SnapshotStored)

    play(scene())


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
                lambda: len([i for i in listener.inputs if isinstance(i, AgentConnected)]) == 3
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
                lambda: len([i for i in listener.inputs if isinstance(i, AgentConnected)]) == 2
            )
            assert (await listener.connected()).state.held == (
                SnapshotFiles(NODE, tuple(sorted(FILES))),
            )
            assert not Path(answer.folder).exists(), "links to files of a dead process"
            answer = await fetched(listener, "node-1", to_fetch(run, NODE))
            assert answer.why == ""
            manifests.verify(Path(answer.folder), commit(run, NODE))
        assert {Path(name).name for name in files_below(disk)} == set(FILES)

    play(scene())


def test_an_agent_of_a_run_without_snapshots_listens_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path, orphan_seconds=30.0)

    async def scene() -> None:
        async with agents(run, "node-1") as (listener, _):
            state = (await listener.connected()).state
            assert (state.held, state.address) == ((), "")

    play(scene())
