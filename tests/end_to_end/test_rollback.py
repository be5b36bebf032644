"""A person has a run go back while it trains: in place, in the same processes, and told by the
chronicle; a failure behind it restarts on the new branch."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from tests.end_to_end import driving
from tests.end_to_end.test_hangs import troubled

EVERY = 10


def go_back(run: RunDirectory, step: int, why: str, *more: str) -> str:
    """Have a person ask for it; what the command says."""
    asked = subprocess.run(
        driving.command("intervene", str(run.path), f"roll_back={step}", *more, "--why", why),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def test_a_run_goes_back_in_its_own_processes(tmp_path: Path) -> None:
    process = driving.start(
        tmp_path,
        *driving.ENDLESS,
        "optim.decay_steps=1000",
        "checkpoint.every_steps=40",
        f"checkpoint.memory_every_steps={EVERY}",
        # Step 20 stays for as long as the command may take to start.
        "checkpoint.memory_keep=40",
    )
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 25, 120, process, tmp_path)
        ranks = {driving.rank_process(tmp_path, rank) for rank in (0, 1)}
        told = go_back(run, 20, "the loss climbs", "lr_scale=0.5")
        assert "to go back to step 20" in told, told
        driving.wait_for(
            lambda: max(driving.metrics(run).get("1.01", {0: {}})) > 45, 60, process, tmp_path
        )
        assert {driving.rank_process(tmp_path, rank) for rank in (0, 1)} == ranks
        _, back = driving.of_kind(run, "attempt_started")
        assert (back.attempt, back.step, back.event.rollback) == ("1.01", 20, 1)
        assert back.event.checkpoint == "memory/1.00/step-00000020"
        [ended] = driving.of_kind(run, "attempt_ended")
        assert ended.event.outcome == "rolled back"
        assert driving.of_kind(run, "failure_seen") == []
        lines = driving.metrics(run)["1.01"]
        assert min(lines) == 21
        for number, line in lines.items():
            whole = 1e-3 + (1e-4 - 1e-3) * (number - 1 - 4) / (1000 - 4)
            assert line["lr"] == pytest.approx(0.5 * whole)

        os.kill(driving.rank_process(tmp_path, rank=1), signal.SIGKILL)
        driving.wait_for(
            lambda: max(driving.metrics(run).get("1.02", {0: {}})) > 60, 120, process, tmp_path
        )
        [*_, begun] = driving.of_kind(run, "attempt_started")
        assert begun.event.parent == "1.01"
        assert min(driving.metrics(run)["1.02"]) > 40
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 120) == 75, driving.tail(tmp_path)
        story = (run.chronicle / "chronicle.md").read_text()
        told = "back to step 20, with the learning rate times 0.5: The loss climbs (by "
        assert told in story, story
    finally:
        driving.end(process, tmp_path)


def test_a_result_that_does_not_come_again_is_blamed_on_its_node(tmp_path: Path) -> None:
    process = driving.start(
        tmp_path,
        "train.steps=100000",
        "cluster.rank_module=tests.end_to_end.troubled_rank",
        "checkpoint.every_steps=150",
        f"checkpoint.memory_every_steps={EVERY}",
        "checkpoint.memory_keep=100",
        environment=troubled(tmp_path, wrong=(1, 30)),
    )
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 45, 120, process, tmp_path)
        go_back(run, 20, "rank 1 is odd")
        driving.wait_for(
            lambda: driving.of_kind(run, "replay_compared") != [], 60, process, tmp_path
        )
        [compared] = driving.of_kind(run, "replay_compared")
        assert (compared.event.verdict, compared.event.same) == ("one-time", 10)
        assert (compared.event.differs, compared.event.ranks) == (31, 1)
        assert (compared.event.rank, compared.event.node) == (1, "node-2")
        assert "a one-time result of rank 1 on node-2" in compared.event.what
        [noted] = driving.of_kind(run, "finding_noted")
        assert (noted.event.cause, noted.event.node) == ("silent_corruption", "node-2")
        assert noted.event.detail == "not_reproduced"
        driving.wait_for(
            lambda: len(driving.of_kind(run, "attempt_started")) == 3, 120, process, tmp_path
        )
        begun = driving.of_kind(run, "attempt_started")[-1].event
        assert begun.nodes == ("node-1", "node-3")
        driving.wait_for(
            lambda: len(driving.metrics(run).get("1.02", {})) > 40, 120, process, tmp_path
        )
        back = 10 * (driving.newest_step(run) // 10 - 2)
        go_back(run, back, "to compare")
        driving.wait_for(
            lambda: len(driving.of_kind(run, "replay_compared")) == 2, 60, process, tmp_path
        )
        event = driving.of_kind(run, "replay_compared")[-1].event
        assert (event.verdict, event.ranks, event.node) == ("reproduced", 0, "")
        assert event.same >= 10
        assert len(driving.of_kind(run, "finding_noted")) == 1
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 120) == 75, driving.tail(tmp_path)
        assert compared.event.what in (run.chronicle / "chronicle.md").read_text()
    finally:
        driving.end(process, tmp_path)
