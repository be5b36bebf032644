"""A new lineage trains with its own code from its first step on: agents of the one before, which
outlived their supervisor, hold warm ranks that have imported the old code."""

import json
import os
import signal
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from tests.end_to_end import driving

ONE_NODE = ("cluster.nodes=1", "cluster.buffer_nodes=0", "train.global_batch=4")


@pytest.mark.slow
def test_agents_of_the_lineage_before_are_ended_first(tmp_path: Path) -> None:
    run = driving.run_directory(tmp_path)
    process = driving.start(tmp_path, *ONE_NODE, *driving.ENDLESS)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 12, 120, process, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = agent(run)
        assert code_of(before) == run.path / "code" / "1"
        process = driving.start(
            tmp_path,
            *ONE_NODE,
            *driving.ENDLESS,
            "optim.lr=5e-4",
            "lineage=new",
            "cluster.code=node",
            f"checkpoint.node_directory={tmp_path / 'disk'}",
        )
        driving.wait_for(
            lambda: len(driving.of_kind(run, "training_began")) == 2, 120, process, tmp_path
        )
        assert not Path(f"/proc/{before}").exists(), "an agent of the old lineage lives"
        assert code_of(agent(run)) == run.path / "code" / "2"
        assert code_of(driving.rank_process(tmp_path, 0)).is_relative_to(tmp_path / "disk")
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 60) == 75
        assert [entry.attempt for entry in driving.of_kind(run, "attempt_started")] == [
            "1.00",
            "2.00",
        ]
    finally:
        driving.end(process, tmp_path)


def agent(run: RunDirectory) -> int:
    """The pid of the agent that is registered."""
    pid: int = json.loads((run.nodes / "node-1" / "agent.json").read_text())["pid"]
    return pid


def code_of(pid: int) -> Path:
    """Where a process looks for packages first."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    [path] = [v for v in variables if v.startswith(b"PYTHONPATH=")]
    return Path(os.fsdecode(path.partition(b"=")[2].split(b":")[0]))
