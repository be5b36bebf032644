"""A held run saves and rests, and nothing starts it until a person resumes it, whoever died
meanwhile."""

import signal
import subprocess
from pathlib import Path

from tests.end_to_end import driving


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """What `opt-train` answers, as a process of its own."""
    done = driving.command(*words)
    return subprocess.run(done, capture_output=True, text=True, timeout=60, check=False)


def test_a_held_run_saves_and_is_started_by_nobody_until_it_is_resumed(tmp_path: Path) -> None:
    run = driving.run_directory(tmp_path)
    process = driving.start(tmp_path, *driving.ENDLESS)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, tmp_path)
        assert "next: a checkpoint at step " in ask("status", str(run.path)).stdout
        assert ask("hold", str(run.path), "--reason", "look").returncode == 0
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
        saved = driving.of_kind(run, "run_stopped")[-1].event.saved_step
        assert saved >= 3
        assert driving.processes_of(tmp_path) == []

        attempts = driving.kinds(run).count("attempt_started")
        process = driving.start(tmp_path, *driving.ENDLESS)
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
        assert driving.kinds(run).count("attempt_started") == attempts
        assert "nothing trains until `opt-train resume" in driving.tail(tmp_path)

        assert ask("resume", str(run.path)).returncode == 0
        process = driving.start(tmp_path, *driving.ENDLESS)
        driving.wait_for(lambda: driving.newest_step(run) >= saved + 3, 120, process, tmp_path)
        assert driving.of_kind(run, "attempt_started")[-1].step == saved
        assert ask("stop", str(run.path)).returncode == 0
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
    finally:
        driving.end(process, tmp_path)


def test_ranks_that_a_dead_supervisor_left_are_led_once_more_only_to_save(tmp_path: Path) -> None:
    run = driving.run_directory(tmp_path)
    process = driving.start(tmp_path, *driving.ENDLESS, "supervisor.orphan_seconds=60")
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        held = ask("hold", str(run.path))
        assert "kept only if one is started before" in held.stdout
        status = ask("status", str(run.path)).stdout
        assert "nobody leads it; process " in status
        assert "train on until " in status

        process = driving.start(tmp_path, *driving.ENDLESS, "supervisor.orphan_seconds=60")
        assert driving.finish(process, tmp_path, 90) == 75, driving.tail(tmp_path)
        kinds = driving.kinds(run)
        assert kinds.count("attempt_started") == 1
        assert "agents_adopted" in kinds
        assert driving.of_kind(run, "run_stopped")[-1].event.saved_step >= 3
        assert driving.processes_of(tmp_path) == []
    finally:
        driving.end(process, tmp_path)
