"""A run that goes on with fewer ranks reads the same samples in the same batches, and its losses
agree to rounding."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import driving
from tests.resume.kills import OVERRIDES, Starter
from tests.resume.struck_rank import IN_PEACE, Generation, Strike, record_of

STEPS = 40
WORLDS = (4, 3, 2, 1)
"""Eight sequences a batch: three ranks have unequal shares, and one of them a padded
micro-batch."""
TOLERANCE = 1e-6
"""Of the loss, relative, in fp32. Measured over these steps: 8e-8, less than one unit in the last
place of a float."""


@pytest.mark.slow
def test_fewer_ranks_read_the_same_batches(tmp_path: Path) -> None:
    whole, shrinking = tmp_path / "whole", tmp_path / "shrinking"
    words = (
        "train",
        *OVERRIDES,
        f"data.directory={tmp_path / 'data'}",
        "model.dropout=0",
        f"train.steps={STEPS}",
    )
    kill = Strike(moment="step", after=9, delay_seconds=0.0, rank=0, takes_all=True)
    for folder in (whole, shrinking):
        folder.mkdir()
        (folder / "strikes.json").write_text(json.dumps([asdict(kill)] * (len(WORLDS) - 1)))

    with Starter() as starter:

        def train(folder: Path, world_size: int, number: int) -> list[int]:
            own = (*words, f"runs={folder / 'runs'}")
            return starter.start(
                Generation(own, world_size, str(folder), number, notes_samples=True)
            )

        assert starter.start(Generation(("prepare", *words[1:]), 1, str(tmp_path))) == [0], (
            driving.tail(tmp_path)
        )
        assert train(whole, WORLDS[0], IN_PEACE) == [0] * WORLDS[0], driving.tail(whole)
        for number, world_size in enumerate(WORLDS[:-1]):
            train(shrinking, world_size, number)
            assert record_of(shrinking, number).exists(), driving.tail(shrinking)
        assert train(shrinking, WORLDS[-1], IN_PEACE) == [0], driving.tail(shrinking)

    run = driving.run_directory(shrinking)
    starts = [entry.step for entry in driving.of_kind(run, "attempt_started")]
    assert len(starts) == len(WORLDS)
    assert starts == sorted(set(starts)), (
        "each world went on from a later checkpoint than the one before"
    )
    [expected] = driving.metrics(driving.run_directory(whole)).values()
    read = samples_read(whole, IN_PEACE, WORLDS[0])
    batch = Counter({8: len(expected)})
    assert Counter(sum(sequences.values()) for sequences in read.values()) == batch, (
        "eight sequences a batch"
    )
    differences = []
    attempts = zip((0, 1, 2, IN_PEACE), WORLDS, driving.metrics(run).values(), strict=True)
    for number, world_size, lines in attempts:
        read_now = samples_read(shrinking, number, world_size)
        for step, line in lines.items():
            same = {name: expected[step][name] for name in ("samples", "tokens", "updates", "lr")}
            assert {name: line[name] for name in same} == same, f"step {step} on {world_size} ranks"
            cursor = line["samples"] - 8
            assert read_now[cursor] == read[cursor], f"step {step} on {world_size} ranks"
            differences.append(relative(line, expected[step]))
    assert {step for lines in driving.metrics(run).values() for step in lines} == set(
        range(1, STEPS + 1)
    )
    assert expected[STEPS]["loss"] < expected[1]["loss"] - 0.3, (
        "it learns, so that sameness means something"
    )
    print(f"losses differ by {max(differences):.1e} at most")
    assert max(differences) < TOLERANCE


def samples_read(folder: Path, number: int, world_size: int) -> dict[int, Counter[str]]:
    """Cursor to the sequences that all ranks of a generation together read there."""
    found: dict[int, Counter[str]] = {}
    for rank in range(world_size):
        for line in (folder / f"read-{number}-{rank}").read_text().splitlines():
            cursor, sequences = json.loads(line)
            found.setdefault(cursor, Counter()).update(sequences)
    return found


def relative(line: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    return float(abs(line["loss"] - expected["loss"]) / expected["loss"])
