"""The supervisor's hand on checkpoints: fenced by the lock, and never outside the run's own
folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.run.checkpoint_keeper import CheckpointKeeper

PATH = "checkpoints/1.00/step-00000003"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.checkpoints.mkdir(parents=True)
    return directory


def saved(run: RunDirectory, folder: Path) -> dict[str, Any]:
    """What a rank has written into `folder` and reported, as the save at `PATH`."""
    folder.mkdir(parents=True)
    files = {}
    for name, content in (("state.json", b"{}"), ("model.safetensors", b"weights")):
        (folder / name).write_bytes(content)
        files[name] = (len(content), hashlib.sha256(content).hexdigest())
    return {"path": PATH, "folder": str(folder), "attempt": "1.00", "step": 3, "files": files}


def test_a_manifest_is_committed_verified_and_retired(run: RunDirectory) -> None:
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        done = keeper.commit(**saved(run, run.path / PATH), journal_head="0" * 64)
        assert (done.why, done.files, done.bytes) == ("", 2, 9)
        assert keeper.verify(PATH, done.manifest_sha256).why == ""
        keeper.retire(PATH)
        assert not (run.path / PATH).exists()


def test_a_supervisor_that_was_succeeded_commits_and_removes_nothing(run: RunDirectory) -> None:
    """It slept through its lease: what it makes valid, or throws away, is another one's by now."""
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        wanted = saved(run, run.path / PATH)
        run.lock.write_text(json.dumps(json.loads(run.lock.read_text()) | {"leader": 2}))
        assert "taken over" in keeper.commit(**wanted, journal_head="0" * 64).why
        assert not (run.path / PATH / "manifest.json").exists()
        keeper.retire(PATH)
        assert (run.path / PATH / "model.safetensors").exists()


@pytest.mark.parametrize(
    "path", ["../precious/folder", "checkpoints/../../precious/folder", "checkpoints/1.00", "/etc"]
)
def test_a_path_that_is_no_checkpoint_of_the_run_is_not_touched(
    run: RunDirectory, path: str
) -> None:
    precious = run.path.parent / "precious" / "folder"
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        (run.checkpoints / "1.00").mkdir()
        saved(run, precious)
        keeper.retire(path)
        assert "is no checkpoint of this run" in keeper.verify(path, "").why
        assert (precious / "model.safetensors").exists()
        assert (run.checkpoints / "1.00").exists()


def test_what_was_never_committed_is_cleared_and_nothing_else(run: RunDirectory) -> None:
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        for name in (
            PATH,
            "checkpoints/1.00/step-00000006",
            "checkpoints/1.01/step-00000004",
            "step-00000001",
        ):
            saved(run, run.path / name)
        keeper.clear(("1.00", "..", "1.07"), {PATH})
        left = sorted(str(folder.relative_to(run.path)) for folder in run.path.rglob("step-*"))
        assert left == [PATH, "checkpoints/1.01/step-00000004", "step-00000001"]


def test_shards_that_lie_elsewhere_are_not_vouched_for(run: RunDirectory) -> None:
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        wanted = saved(run, run.path.parent / "elsewhere" / "1.00" / "step-00000003")
        assert "instead of" in keeper.commit(**wanted, journal_head="0" * 64).why
