"""Checkpoints of real ranks over gloo: sharded, resharded, failing and killed. The scenarios stand
in `ranks.py`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import retire_checkpoint
from opt_train.checkpoint.manifest import CheckpointError

PROGRAM = Path(__file__).with_name("ranks.py")
TIMEOUT_SECONDS = 60


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks a test started; none outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def start(
    started: list[subprocess.Popen[str]], scenario: str, world: int, root: Path
) -> list[subprocess.Popen[str]]:
    new = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(PROGRAM),
                scenario,
                str(rank),
                str(world),
                str(root),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    started += new
    return new


def finish(processes: list[subprocess.Popen[str]]) -> None:
    outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def test_two_ranks_resume_exactly_and_one_reads_the_same(
    ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    finish(start(ranks, "save_and_resume", 2, tmp_path))
    manifest = manifests.verify(tmp_path / "step-00000003")
    assert len([name for name in manifest.files if name.endswith(".safetensors")]) == 2
    assert manifest.state == {"step": 3, "nothing": "NaN"}
    finish(start(ranks, "resume_elsewhere", 1, tmp_path))


def test_one_rank_s_checkpoint_is_read_by_three(
    ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    finish(start(ranks, "save_and_resume", 1, tmp_path))
    finish(start(ranks, "resume_elsewhere", 3, tmp_path))


def test_no_forward_pass_or_missing_step_spoils_a_checkpoint(
    ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    finish(start(ranks, "after_evaluation,before_the_first_step", 2, tmp_path))


def test_what_fails_on_one_rank_fails_on_all_and_nobody_waits(
    ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    finish(start(ranks, "fails_on_one_rank,flipped_byte", 2, tmp_path))


def test_ranks_killed_in_a_save_leave_the_checkpoint_before(
    ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    processes = start(ranks, "killed_in_the_middle", 2, tmp_path)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not all((tmp_path / f"writing-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    half = tmp_path / "step-00000003"
    assert list(half.iterdir())
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        manifests.verify(half)
    good = tmp_path / "step-00000002"
    assert manifests.verify(good).state == {"step": 2}
    finish(start(ranks, "restore_before", 2, tmp_path))
    retire_checkpoint(half)
    assert not half.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs of 1 MB needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_the_save_on_all_ranks_and_gives_the_space_back(
    ranks: list[subprocess.Popen[str]], tmp_path: Path, small_disk: Path
) -> None:
    finish(start(ranks, "full_disk", 2, tmp_path))
    assert not (small_disk / "1.00" / "step-00000001").exists()
