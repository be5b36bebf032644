"""What agents hold, under real kills: one rank, one node, all of a failure domain, a node and its
partner.

Each costs the steps since what could still be restored, and the test prints them.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record.events import Entry

from tests.end_to_end import driving

EVERY, SHARED_EVERY = 10, 60
LAYOUT = (
    "cluster.nodes=4",
    "cluster.buffer_nodes=5",
    "cluster.nodes_per_domain=2",
    "train.micro_batch=2",
    f"checkpoint.memory_every_steps={EVERY}",
    f"checkpoint.every_steps={SHARED_EVERY}",
    "train.steps=100000",
)


def kill_agents(folder: Path, *nodes: str) -> None:
    """SIGKILL, all before any of them can be missed; their ranks die with them, and so does what
    they held."""
    run = driving.run_directory(folder)
    for pid in [json.loads((run.nodes / node / "agent.json").read_text())["pid"] for node in nodes]:
        os.kill(pid, signal.SIGKILL)


def closed_step(run: driving.RunDirectory) -> int | None:
    """Where training was when the newest failure was seen."""
    return driving.of_kind(run, "failure_seen")[-1].step


def test_a_restart_takes_the_newest_snapshot_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = driving.start(tmp_path, *LAYOUT)
    run = driving.run_directory(tmp_path)

    def committed(tier: str) -> list[int]:
        found = driving.of_kind(run, "checkpoint_committed")
        return [entry.step or 0 for entry in found if entry.event.tier == tier]

    def fails(kill: Callable[[tuple[str, ...]], None]) -> tuple[Entry, Entry]:
        """The restart after `kill`, which is told the nodes that train, and the incident's end."""
        before = len(driving.of_kind(run, "incident_closed"))
        # Two snapshots of this attempt, beyond what the file system has.
        driving.wait_for(lambda: committed("shared") != [], 150, process, tmp_path)
        began = driving.of_kind(run, "attempt_started")[-1].step or 0
        wanted = max([began, *committed("shared"), *committed("memory")]) + 2 * EVERY
        driving.wait_for(lambda: max(committed("memory")) >= wanted, 150, process, tmp_path)
        held, saved = committed("memory"), committed("shared")
        kill(driving.of_kind(run, "attempt_started")[-1].event.nodes)
        driving.wait_for(
            lambda: len(driving.of_kind(run, "incident_closed")) > before, 150, process, tmp_path
        )
        restart, closed = (
            driving.of_kind(run, "attempt_started")[-1],
            driving.of_kind(run, "incident_closed")[-1],
        )
        # The newest snapshot may not have had its copy yet, the one before had.
        least = held[-2] if restart.event.checkpoint.startswith("memory/") else saved[-1]
        assert restart.step is not None
        assert restart.step >= least, f"{restart.event.checkpoint}, though {least} was there"
        assert closed.event.steps_lost == max(0, (closed_step(run) or 0) - restart.step)
        return restart, closed

    lost: list[str] = []
    try:
        for what, kill, tier in (
            (
                "one rank",
                lambda nodes: os.kill(driving.rank_process(tmp_path, 2), signal.SIGKILL),
                "memory",
            ),
            ("one node", lambda nodes: kill_agents(tmp_path, nodes[1]), "memory"),
            (
                "a domain of two nodes",
                lambda nodes: kill_agents(tmp_path, nodes[2], nodes[3]),
                "memory",
            ),
            (
                "a node and its partner",
                lambda nodes: kill_agents(tmp_path, nodes[0], nodes[2]),
                "checkpoints",
            ),
        ):
            restart, closed = fails(kill)
            steps = closed.event.steps_lost
            source = restart.event.checkpoint
            lost.append(f"  {what:24}{steps:4} steps lost, restored {source}")
            assert source.split("/")[0] == tier, (lost, driving.tail(tmp_path))
        assert [e.event.outcome for e in driving.of_kind(run, "incident_closed")] == [
            "recovered"
        ] * 4
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 90) == 75, driving.tail(tmp_path)
        # What nobody can hold any more is on record, once each; nothing was taken for good that was
        # not.
        rejected = {
            entry.event.path: entry.event.why
            for entry in driving.of_kind(run, "checkpoint_rejected")
        }
        assert all("no node that is left holds" in why for why in rejected.values()), rejected
        (stopped,) = [entry.event for entry in driving.of_kind(run, "run_stopped")]
        assert committed("shared")[-1] == committed("memory")[-1] == stopped.saved_step, (
            "both tiers at the stop"
        )
    finally:
        driving.end(process, tmp_path)
    with capsys.disabled():
        print(
            f"\nsnapshots every {EVERY} steps, checkpoints every {SHARED_EVERY}:\n"
            + "\n".join(lost)
        )
