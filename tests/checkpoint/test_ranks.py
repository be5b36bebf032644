"""Checkpoints of real ranks over gloo: sharded, resharded, failing and killed. The scenarios stand
in `ranks.py`."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import retire_checkpoint
from opt_train.checkpoint.manifest import CheckpointError
from tests.train import forked
from tests.train.forked import Forked
from tests.train.rig import environment

PROGRAM = Path(__file__).with_name("ranks.py")
TIMEOUT_SECONDS = 60


class Ranks:
    """Starts ranks that meet in a folder; none outlives the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._started: list[Forked] = []

    def start(self, scenario: str, world: int) -> list[Forked]:
        """Ranks of a world of that size; `finish` waits for their end."""
        new = []
        for rank in range(world):
            with self._output_of(len(self._started) + rank).open("wb") as output:
                words = [str(PROGRAM), scenario, str(rank), str(world), str(self.root)]
                new.append(
                    forked.server().start(
                        words,
                        env=environment(),
                        stdout=output,
                        stderr=output,
                    )
                )
        self._started += new
        return new

    def finish(self, scenario: str, world: int) -> None:
        """Start ranks; all must end well."""
        codes = [process.wait(timeout=TIMEOUT_SECONDS) for process in self.start(scenario, world)]
        assert codes == [0] * world, self.outputs()

    def outputs(self) -> str:
        """What all ranks have said."""
        return "\n".join(
            self._output_of(number).read_text(errors="replace")
            for number in range(len(self._started))
        )

    def _output_of(self, number: int) -> Path:
        return self.root / f"output-{number}"

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    started.kill()


def test_two_ranks_resume_exactly_and_one_reads_the_same(ranks: Ranks, tmp_path: Path) -> None:
    ranks.finish("save_and_resume", 2)
    manifest = manifests.verify(tmp_path / "step-00000003")
    assert len([name for name in manifest.files if name.endswith(".safetensors")]) == 2
    assert manifest.state == {"step": 3, "nothing": "NaN"}
    ranks.finish("resume_elsewhere", 1)


def test_one_rank_s_checkpoint_is_read_by_three(ranks: Ranks, tmp_path: Path) -> None:
    ranks.finish("save_and_resume", 1)
    ranks.finish("resume_elsewhere", 3)


def test_no_forward_pass_or_missing_step_spoils_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    ranks.finish("after_evaluation,before_the_first_step", 2)


def test_what_fails_on_one_rank_fails_on_all_and_nobody_waits(ranks: Ranks, tmp_path: Path) -> None:
    ranks.finish("fails_on_one_rank,flipped_byte", 2)


def test_ranks_killed_in_a_save_leave_the_checkpoint_before(ranks: Ranks, tmp_path: Path) -> None:
    processes = ranks.start("killed_in_the_middle", 2)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not all((tmp_path / f"writing-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), ranks.outputs()
        time.sleep(0.05)
    ranks.kill()
    half = tmp_path / "step-00000003"
    assert list(half.iterdir())
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        manifests.verify(half)
    good = tmp_path / "step-00000002"
    assert manifests.verify(good).state == {"step": 2}
    ranks.finish("restore_before", 2)
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
    ranks: Ranks, tmp_path: Path, small_disk: Path
) -> None:
    ranks.finish("full_disk", 2)
    assert not (small_disk / "1.00" / "step-00000001").exists()
