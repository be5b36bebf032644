"""Ctrl-C saves and leaves; the same command goes on, and ends at the very weights of a run that
nobody stopped."""

import signal
from pathlib import Path

from safetensors.numpy import load_file

from tests.end_to_end import driving


def last_checkpoint(run: driving.RunDirectory) -> dict[tuple[str, str], bytes]:
    """(file, tensor) to its bits, of the newest committed checkpoint. The order of a file's header
    is not fixed."""
    folder = run.path / driving.of_kind(run, "checkpoint_committed")[-1].event.path
    return {
        (path.name, name): tensor.tobytes()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_a_stopped_run_resumes_to_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    enough = "train.steps=80"  # to be stopped in time, even by a test that is kept waiting
    process = driving.start(broken, enough)
    run = driving.run_directory(broken)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 15, 120, process, broken)
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, broken, 60) == 75, driving.tail(broken)
        stopped = driving.of_kind(run, "run_stopped")[-1].event
        assert stopped.saved_step >= 15
        assert driving.processes_of(broken) == [], "a stopped run left processes behind"

        process = driving.start(broken, enough)
        assert driving.finish(process, broken, 240) == 0, driving.tail(broken)
        resumed = driving.of_kind(run, "attempt_started")[-1]
        assert resumed.step == stopped.saved_step, (
            "the resumed attempt did not start where the stopped one was saved"
        )

        process = driving.start(unbroken, enough)
        assert driving.finish(process, unbroken, 240) == 0, driving.tail(unbroken)
        assert last_checkpoint(run) == last_checkpoint(driving.run_directory(unbroken))
    finally:
        driving.end(process, broken)
        driving.end(process, unbroken)
