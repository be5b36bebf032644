"""One of two ranks finds a flipped byte as it reads the newest checkpoint: both leave, and both go
on with the one before."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from opt_logbook.record.events import Entry

from opt_train.protocol.exits import BAD_INPUT, DONE
from tests.end_to_end import driving
from tests.resume.kills import OVERRIDES, WORLD_SIZE, Starter
from tests.resume.struck_rank import IN_PEACE, Generation, Strike, record_of

STEPS = 24


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    with Starter() as starter:
        yield starter


class Trained:
    """A run of two ranks without a supervisor in `folder`."""

    def __init__(self, folder: Path, starter: Starter) -> None:
        self.folder, self._starter = folder, starter
        self.run = driving.run_directory(folder)

    def train_and_kill(self) -> None:
        """Kill it when it has committed its third save."""
        strike = Strike(moment="committed", after=2, delay_seconds=0.0, rank=0, takes_all=True)
        (self.folder / "strikes.json").write_text(json.dumps([asdict(strike)]))
        self._start("prepare", 1)
        self._start("train", WORLD_SIZE, number=0)
        assert record_of(self.folder, 0).exists(), driving.tail(self.folder)

    def go_on(self) -> list[int]:
        """Start the same command again; the exit codes of its ranks."""
        return self._start("train", WORLD_SIZE)

    def _start(self, verb: str, world_size: int, number: int = IN_PEACE) -> list[int]:
        words = (
            verb,
            *OVERRIDES,
            f"data.directory={driving.prepared()}",
            f"runs={self.folder / 'runs'}",
            f"train.steps={STEPS}",
        )
        return self._starter.start(Generation(words, world_size, str(self.folder), number))

    def committed(self) -> list[Entry]:
        return driving.of_kind(self.run, "checkpoint_committed")

    def flip_a_byte(self, saved: Entry, shard: int) -> str:
        """Of the checkpoint's shard of that number; returns its name."""
        path = sorted((self.run.path / saved.event.path).glob("*.safetensors"))[shard]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return path.name


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, starter: Starter) -> Path:
    """The folder of a run that has been killed."""
    trained = Trained(tmp_path_factory.mktemp("killed"), starter)
    trained.train_and_kill()
    return trained.folder


@pytest.fixture
def trained(killed: Path, tmp_path: Path, starter: Starter) -> Trained:
    """A copy of it, which a test may damage and go on with."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return Trained(tmp_path, starter)


def test_one_rank_finds_a_flipped_byte_and_all_go_on_with_the_checkpoint_before(
    trained: Trained,
) -> None:
    *_, before, newest = trained.committed()
    name = trained.flip_a_byte(newest, shard=1)
    assert trained.go_on() == [DONE] * WORLD_SIZE, driving.tail(trained.folder)

    [rejected] = driving.of_kind(trained.run, "checkpoint_rejected")
    assert (rejected.event.path, rejected.step) == (newest.event.path, newest.step)
    assert f"{name} has a wrong checksum" in rejected.event.why
    # The first of the three was killed; the second never trained.
    starts = driving.of_kind(trained.run, "attempt_started")
    assert [entry.event.checkpoint for entry in starts] == [
        "",
        newest.event.path,
        before.event.path,
    ]
    ends = [entry.event.outcome for entry in driving.of_kind(trained.run, "attempt_ended")]
    assert ends == ["failed", "failed", "finished"]
    assert sorted(driving.metrics(trained.run)) == ["1.00", "1.02"]
    assert driving.newest_step(trained.run) == STEPS


def test_with_every_checkpoint_corrupt_nobody_begins_anew(trained: Trained) -> None:
    saved = trained.committed()
    for checkpoint in saved:
        trained.flip_a_byte(checkpoint, shard=0)
    assert trained.go_on() == [BAD_INPUT] * WORLD_SIZE
    assert "no checkpoint of" in driving.tail(trained.folder)
    rejected = driving.of_kind(trained.run, "checkpoint_rejected")
    assert [entry.step for entry in rejected] == [entry.step for entry in reversed(saved)]
    assert sorted(driving.metrics(trained.run)) == ["1.00"]
