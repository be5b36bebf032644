"""k steps, a kill, a resume and N-k steps give bit for bit the weights and losses of N steps on the
same layout."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from opt_train.checkpoint.config import CheckpointConfig
from tests.train.rig import World, tensors_in, tiny_config

LINE = (
    "loss",
    "lr",
    "grad_norm",
    "grad_norm_clipped",
    "activation_norm",
    "tokens",
    "samples",
    "updates",
)


# So many that a test which is kept waiting for a second does not find a run done that it wants to
# kill in one of its first thirty.
@pytest.mark.parametrize("steps", [50, pytest.param(80, marks=pytest.mark.whole)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, steps: int) -> None:
    config = tiny_config(tmp_path, steps=steps)
    config = replace(config, checkpoint=CheckpointConfig(every_steps=5))
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()

    with World(whole, config) as world:
        world.begin()
        assert [leaving.code for leaving in world.finish()] == [0, 0]
        expected = world.ranks[0].metrics
        final = world.commit(steps)
    assert sorted(expected) == list(range(1, steps + 1))
    assert (
        expected[steps]["loss"] < expected[1]["loss"] - 0.3
    )  # it learns, so that sameness means something

    chance = random.Random(20)
    found: dict[int, dict[str, object]] = {}
    checkpoint: Path | None = None
    for attempt, kill_at in enumerate([chance.randint(6, 10), chance.randint(20, 40)]):
        with World(broken, config) as world:
            world.begin(attempt=f"1.{attempt:02d}", generation=attempt + 1, checkpoint=checkpoint)
            world.wait_for_step(kill_at)
            world.kill()
            for rank in world.ranks:
                rank.read()
            found |= world.ranks[0].metrics
            if (saved := world.newest_save()) > 0:
                checkpoint = world.commit(saved)
    assert checkpoint is not None, "both attempts were killed before their first save"
    with World(broken, config) as world:
        world.begin(attempt="1.02", generation=3, checkpoint=checkpoint)
        assert [leaving.code for leaving in world.finish()] == [0, 0]
        resumed = world.ranks[0].metrics
        # The head of the journal anchors an attempt's first line, and only that.
        assert [line.get("journal_head") for line in resumed.values()] == ["ab" * 32] + [None] * (
            len(resumed) - 1
        )
        last = world.commit(steps)

    for step, line in (found | resumed).items():
        assert {key: line[key] for key in LINE} == {key: expected[step][key] for key in LINE}, (
            f"step {step}"
        )
    assert tensors_in(last) == tensors_in(final)
    assert len(tensors_in(final)) > 100
