"""Ctrl-C saves and leaves; the same command goes on, and ends at the very weights of a run that nobody stopped."""

import signal
from pathlib import Path

import pytest

from tests.end_to_end import driving


def last_checkpoint_files(run: driving.RunDirectory) -> dict[str, str]:
    """Hash of each tensor file of the newest committed checkpoint."""
    import json

    newest = driving.of_kind(run, "checkpoint_committed")[-1].event
    manifest = json.loads((run.path / newest.path / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


@pytest.mark.timeout(300)
def test_a_stopped_run_resumes_to_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    process = driving.start(broken)
    run = driving.run_directory(broken)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 15, 120, process, broken)
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, broken, 60) == 75, driving.tail(broken)
        stopped = driving.of_kind(run, "run_stopped")[-1].event
        assert stopped.saved_step >= 15
        assert driving.processes_of(broken) == [], "a stopped run left processes behind"

        process = driving.start(broken)
        assert driving.finish(process, broken, 120) == 0, driving.tail(broken)
        resumed = driving.of_kind(run, "attempt_started")[-1]
        assert resumed.step == stopped.saved_step, "the resumed attempt did not start where the stopped one was saved"

        process = driving.start(unbroken)
        assert driving.finish(process, unbroken, 120) == 0, driving.tail(unbroken)
        assert last_checkpoint_files(run) == last_checkpoint_files(driving.run_directory(unbroken))
    finally:
        driving.end(process, broken)
        driving.end(process, unbroken)
