"""Nodes that are processes of this machine: found again by a new supervisor, and really gone after
a fence."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import NodeState
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.local import LocalCluster
from opt_train.host.processes import NODE_MARK, bears_mark, is_alive, mark_of, stat_of
from tests.agent.harness import HERE, SupervisorEnd, begin
from tests.processes import processes_of


@pytest.fixture
def cluster(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    return LocalCluster(run, ClusterConfig(nodes=2))


def wait_for_agents(cluster: LocalCluster, *nodes: str) -> dict[str, int]:
    deadline = time.monotonic() + 60
    while not all(cluster.agent_pid(node) for node in nodes):
        assert time.monotonic() < deadline, "agents did not register"
        time.sleep(0.02)
    return {node: cluster.agent_pid(node) or 0 for node in nodes}


def test_a_node_nobody_started_is_unknown_and_a_started_one_is_up(cluster: LocalCluster) -> None:
    assert {view.state for view in cluster.observe().values()} == {NodeState.UNKNOWN}
    cluster.start_agent("node-1")
    assert cluster.observe()["node-1"].state == NodeState.UP, (
        "started, but not yet registered, is not down"
    )
    wait_for_agents(cluster, "node-1")
    cluster.release()
    view = cluster.observe()["node-1"]
    assert view.state == NodeState.DOWN
    assert "was killed by SIGKILL" in view.reason


def test_agents_outlive_a_killed_supervisor_and_the_next_one_adopts_them(
    run: RunDirectory, cluster: LocalCluster, tmp_path: Path
) -> None:
    program = (
        "import time; from pathlib import Path; from opt_logbook.record.run_directory import "
        "RunDirectory;"
        "from opt_train.clusters.local import LocalCluster;"
        "from opt_train.clusters.config import ClusterConfig;"
        f"c = LocalCluster(RunDirectory(Path({str(run.path)!r})), ClusterConfig(nodes=2));"
        "c.start_agent('node-1'); c.start_agent('node-2'); time.sleep(1000)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        before = wait_for_agents(cluster, "node-1", "node-2")
    finally:
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
    for node in ("node-1", "node-2"):
        cluster.start_agent(node)
    assert {v.state for v in cluster.observe().values()} == {NodeState.UP}
    assert wait_for_agents(cluster, "node-1", "node-2") == before, "a second agent was started"
    os.kill(before["node-2"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while cluster.observe()["node-2"].state == NodeState.UP and time.monotonic() < deadline:
        time.sleep(0.02)
    assert cluster.observe()["node-2"].reason == f"agent process {before['node-2']} is gone"
    assert cluster.observe()["node-1"].state == NodeState.UP
    cluster.release()
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("agent_is_dead", [False, True])
def test_a_fence_leaves_nothing_of_the_node_and_harms_no_other(
    run: RunDirectory, cluster: LocalCluster, tmp_path: Path, agent_is_dead: bool
) -> None:
    async def scene() -> None:
        async with SupervisorEnd(run) as listener:
            for node in ("node-1", "node-2"):
                cluster.start_agent(node)
                await listener.connected(node)
            listener.server.send("node-1", begin(run, deaf=True, child=True))
            rank = await listener.until(lambda: (s := listener.slot()) and s.step > 0 and s)
            if agent_is_dead:
                os.kill(rank.pid, signal.SIGSTOP)  # neither asks the agent nor its goodwill
                os.kill(cluster.agent_pid("node-1") or 0, signal.SIGKILL)
            assert cluster.fence("node-1")
            left = set(processes_of(tmp_path).values())
            assert left == {mark_of(run.path, "node-2")}
            assert cluster.observe()["node-2"].state == NodeState.UP

    try:
        asyncio.run(scene())
    finally:
        cluster.release()


def test_a_pid_that_was_used_again_is_not_taken_for_the_agent(
    run: RunDirectory, cluster: LocalCluster
) -> None:
    me = stat_of(os.getpid())
    assert me is not None
    folder = run.nodes / "node-1"
    folder.mkdir(parents=True)
    (folder / "agent.json").write_text(
        f'{{"node": "node-1", "pid": {os.getpid()}, "start_ticks": {me.start_ticks - 1}}}'
    )
    assert cluster.observe()["node-1"].state == NodeState.DOWN
    assert not is_alive(os.getpid(), me.start_ticks - 1)
    assert not cluster.signal_process("node-1", os.getpid(), signal.SIGKILL), (
        "this process is none of the node's"
    )
    assert cluster.fence("node-1"), "and a fence does not touch it"


def test_the_mark_of_one_node_does_not_match_anothers(run: RunDirectory) -> None:
    child = subprocess.Popen(
        ["sleep", "100"], env={**os.environ, NODE_MARK: mark_of(run.path, "node-11")}
    )
    try:
        deadline = time.monotonic() + 5
        while (
            not bears_mark(child.pid, mark_of(run.path, "node-11")) and time.monotonic() < deadline
        ):
            time.sleep(0.01)  # in the middle of its exec it shows no environment
        assert bears_mark(child.pid, mark_of(run.path, "node-11"))
        assert not bears_mark(child.pid, mark_of(run.path, "node-1"))
    finally:
        child.kill()
        child.wait()


def test_an_agent_that_leaves_makes_room_for_the_next_one(
    run: RunDirectory, cluster: LocalCluster
) -> None:
    from opt_train.protocol.commands import Leave

    async def scene() -> None:
        async with SupervisorEnd(run) as listener:
            cluster.start_agent("node-1")
            first = (await listener.connected()).state.pid
            listener.server.send("node-1", Leave("the run is stopped"))
            await listener.until(lambda: cluster.agent_pid("node-1") is None)
            again = LocalCluster(run, ClusterConfig(nodes=2))  # the person starts it again
            again.start_agent("node-1")
            second = await listener.until(
                lambda: next(
                    (
                        s.state.pid
                        for s in listener.inputs
                        if getattr(s, "state", None) and s.state.pid != first
                    ),
                    0,
                )
            )
            assert again.agent_pid("node-1") == second
            again.release()

    try:
        asyncio.run(scene())
    finally:
        cluster.release()


# A program on a node ------------------------------------------------------------------------------


def test_a_program_ends_with_its_code_and_output_and_is_the_nodes_own(
    run: RunDirectory, cluster: LocalCluster
) -> None:
    script = f"echo ${NODE_MARK}; echo bad >&2; exit 3"
    end = cluster.run_on("node-2", ["sh", "-c", script], 20.0)
    assert (end.code, end.last_words) == (3, "bad")
    assert end.output.strip() == mark_of(run.path, "node-2")


def test_a_program_that_hangs_is_killed_at_its_deadline_with_what_it_started(
    cluster: LocalCluster,
) -> None:
    began = time.monotonic()
    script = "trap '' TERM INT; sleep 55 & echo $!; sleep 56"
    end = cluster.run_on("node-1", ["sh", "-c", script], 0.5)
    assert time.monotonic() - began < 10.0
    assert end.code is None
    started = stat_of(int(end.output))
    assert started is None or started.state in "ZX"


def test_a_program_that_cannot_be_started_is_an_end_without_a_code(cluster: LocalCluster) -> None:
    end = cluster.run_on("node-1", ["/absent/program"], 20.0)
    assert end.code is None
    assert end.last_words == "/absent/program cannot be started: No such file or directory"


def test_a_fence_ends_a_program_that_somebody_waits_for(cluster: LocalCluster) -> None:
    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(cluster.run_on, "node-1", ["sleep", "54"], 50.0)
        time.sleep(0.2)
        assert cluster.fence("node-1")
        assert ending.result(10.0).code == -signal.SIGKILL
