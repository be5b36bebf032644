"""Whether steps that are trained again came out the same is on record once, and a device that was
wrong once is taken out: whole runs in the simulated world."""

from dataclasses import replace
from typing import Any

import pytest
from opt_logbook.record.events import AttemptStarted, FindingNoted
from opt_logbook.record.node_events import ReplacementBegan
from opt_logbook.record.stability_events import DataProbed, InstabilitySeen, ReplayCompared

from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig

RUN: dict[str, Any] = {
    "memory_every_steps": 5,
    "memory_keep": 10,
    "every_steps": 50,
    "steps": 400,
}
USUAL = {"update_ratio": 1e-3}
SAME = USUAL | {"replay_differs": 0}


def replaying(odd_ranks: tuple[int, ...] = (), **changes: Any) -> World:
    """A run that has gone back and trains again what it trained."""
    stability = StabilityConfig(mode="act", horizon_steps=40)
    world = World(replace(make_config(**RUN | changes), stability=stability))
    world.data.odd_ranks = odd_ranks
    world.start_supervisor()
    world.durations = dict(USUAL)
    world.until_step(150, seconds=2000)
    world.durations = {"update_ratio": 1e-2}
    world.until(InstabilitySeen)
    world.durations = dict(SAME)
    world.until(AttemptStarted, count=2)
    return world


def begun_at(world: World) -> int:
    return world.entries(AttemptStarted)[-1].step or 0


def test_numbers_that_come_again_acquit_all_devices() -> None:
    world = replaying()
    world.until_step(begun_at(world) + 14, seconds=1000)
    assert world.events(ReplayCompared) == []
    world.durations = dict(USUAL)
    world.until(ReplayCompared, seconds=1000)
    [compared] = world.events(ReplayCompared)
    assert (compared.verdict, compared.ranks, compared.node) == ("reproduced", 0, "")
    assert compared.same >= 14
    assert "gave the same numbers again, to the bit" in compared.what
    world.run(3000)
    assert len(world.events(ReplayCompared)) == 1
    assert world.events(FindingNoted) == []


@pytest.mark.parametrize("effects", [0, 1, 2, 3, 4, 5, None])
def test_one_rank_that_was_wrong_once_has_its_node_taken_out(effects: int | None) -> None:
    """Also by a supervisor that dies between the finding and what is done about it."""
    world = replaying()
    world.until_step(begun_at(world) + 8, seconds=1000)
    world.durations = USUAL | {"replay_differs": 1, "replay_rank": 1}
    world.lives = effects
    for _ in range(30):
        if world.core is None:
            world.start_supervisor()
        world.second()
        if world.events(ReplayCompared):
            world.durations = dict(USUAL)
    world.lives = None
    if world.core is None:
        world.start_supervisor()
    world.run(3000)
    compared = world.events(ReplayCompared)
    # Here a new supervisor knows nothing of the lines before it, and says nothing of them.
    assert len(compared) <= 1
    if effects is None:
        assert len(compared) == 1
    if not compared:
        return
    assert (compared[0].verdict, compared[0].rank, compared[0].node) == ("one-time", 1, "n1")
    [noted] = world.events(FindingNoted)
    assert (noted.node, noted.cause, noted.detail) == ("n1", "silent_corruption", "not_reproduced")
    assert (noted.action, noted.mode) == ("replace_at_checkpoint", "act")
    began = world.events(ReplacementBegan)
    assert [(event.node, event.detail) for event in began] == [("n1", "not_reproduced")]
    assert "n1" not in world.events(AttemptStarted)[-1].nodes


def test_of_several_ranks_nobody_is_blamed_nor_where_nothing_is_the_same_twice() -> None:
    world = replaying()
    world.until_step(begun_at(world) + 8, seconds=1000)
    world.durations = USUAL | {"replay_differs": 2}
    world.until(ReplayCompared, seconds=1000)
    [compared] = world.events(ReplayCompared)
    assert (compared.verdict, compared.node) == ("one-time", "")
    assert "of 2 ranks at once, so whose device it was is not known" in compared.what
    world = replaying()
    world.durations = USUAL | {"replay_differs": 2}
    world.until(ReplayCompared, seconds=1000)
    [compared] = world.events(ReplayCompared)
    assert compared.verdict == "not deterministic"
    assert world.events(FindingNoted) == []


@pytest.mark.parametrize(("odd", "node"), [((), ""), ((1,), "n1"), ((0, 1, 2), "")])
def test_a_rank_that_computes_otherwise_than_most_has_its_node_taken_out_at_once(
    odd: tuple[int, ...], node: str
) -> None:
    world = replaying(odd, nodes=3)
    world.until(DataProbed, seconds=1000)
    [probed] = world.events(DataProbed)
    assert ("another loss than others from the same batch" in probed.what) is bool(odd)
    world.run(3000)
    found = [(event.node, event.detail, event.action) for event in world.events(FindingNoted)]
    assert found == ([(node, "disagrees", "replace_now")] if node else [])
    if node:
        assert f"rank 1 on {node} computes" in probed.what
        assert node not in world.events(AttemptStarted)[-1].nodes
