"""Bad data is told from a bad state, its end is found, and it is passed in one go: whole runs in
the simulated world."""

import math
from dataclasses import replace
from typing import Any

import pytest
from opt_logbook.record.events import AttemptStarted, FailureSeen, OrderGiven, RunFinished
from opt_logbook.record.node_events import ActionWithheld
from opt_logbook.record.stability_events import DataProbed, InstabilityClosed, InstabilitySeen

from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig

BATCH = 8
RUN: dict[str, Any] = {
    "memory_every_steps": 2,
    "memory_keep": 20,
    "every_steps": 50,
    "steps": 100,
    "global_batch": BATCH,
}
FROM = 40
"""The batch at which the data becomes bad."""


def started(batches: int, loss: float = math.nan, **changes: Any) -> World:
    """A run that comes to a bad range of so many batches."""
    margin_steps = changes.pop("margin_steps", 4)
    stability = StabilityConfig(mode="act", horizon_steps=20, margin_steps=margin_steps)
    world = World(replace(make_config(**{**RUN, **changes}), stability=stability))
    world.data.bad, world.data.bad_loss = (FROM * BATCH, (FROM + batches) * BATCH), loss
    world.start_supervisor()
    return world.until_step(FROM, seconds=600)


def batches_of(world: World) -> list[int]:
    """The batches that the newest weights were trained on, in order."""
    found, trail = [], world.newest_trail
    while trail is not None:
        found.append(trail.samples // BATCH)
        trail = trail.before
    return found[::-1]


@pytest.mark.parametrize("batches", [4, 26, 150, 700])
def test_a_bad_range_is_passed_in_one_go(batches: int) -> None:
    """And of the good data behind it no more is left out than it is long, or a place's worth."""
    world = started(batches)
    world.run(3000)
    [seen] = world.entries(InstabilitySeen)
    [probed] = world.events(DataProbed)
    assert (seen.event.alarm, seen.event.rung, probed.verdict) == (
        "non_finite",
        "replay",
        "bad data",
    )
    assert probed.bad_from <= FROM * BATCH < probed.bad_to
    trained = batches_of(world)
    left_out = set(range(trained[-1])) - set(trained)
    assert left_out >= set(range(FROM, FROM + batches)), "a part of it is as bad as all of it"
    assert max(left_out) < FROM + 2 * batches + 4
    assert min(left_out) >= FROM - 8
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["helped"]
    assert world.events(RunFinished)
    assert world.events(FailureSeen) == [], "no process ended"
    backs = [e.step for e in world.entries(AttemptStarted)][1:]
    assert len(backs) == 2
    assert backs[0] == backs[1], "both times to the same state"


def test_an_end_that_is_not_found_is_looked_for_again_from_there() -> None:
    world = started(1500)
    world.run(4000)
    assert [e.rung for e in world.events(InstabilitySeen)] == ["replay", "replay"]
    first, second = world.events(DataProbed)
    assert "and beyond" in first.what
    assert "and beyond" not in second.what
    assert second.bad_from >= first.bad_to - BATCH
    assert set(batches_of(world)).isdisjoint(range(FROM, FROM + 1500))
    assert world.events(RunFinished)


@pytest.mark.parametrize("loss", [9.0, 0.5])
def test_too_hard_and_too_easy_are_both_bad(loss: float) -> None:
    """What raises the alarm is not what tells: here updates are of another size with it."""
    world = started(0, loss, steps=300)
    world.durations = {"update_ratio": 1e-3}
    world.until_step(150, seconds=2000)
    world.data.bad = (150 * BATCH, 180 * BATCH)
    world.until_step(151)
    world.durations = {"update_ratio": 1e-2}
    world.until(InstabilitySeen)
    world.durations = {"update_ratio": 1e-3}
    world.run(3000)
    [probed] = world.events(DataProbed)
    assert probed.verdict == "bad data"
    assert probed.usual == pytest.approx(8.0 * (130 + 5) ** -0.2, rel=0.1)
    assert loss in [round(found, 1) for found in probed.losses]
    assert set(batches_of(world)).isdisjoint(range(150, 180))


def test_data_that_is_as_usual_is_trained_on_again() -> None:
    world = started(0, steps=300)
    world.durations = {"update_ratio": 1e-3}
    world.until_step(150, seconds=2000)
    world.durations = {"update_ratio": 1e-2}
    world.until(InstabilitySeen)
    world.durations = {"update_ratio": 1e-3}
    world.run(3000)
    assert [p.verdict for p in world.events(DataProbed)] == ["normal"]
    assert batches_of(world) == list(range(300))
    assert [o.order for o in world.events(OrderGiven)] == ["roll_back"]


def test_a_state_that_has_learnt_from_bad_data_is_gone_back_behind() -> None:
    """The alarm came late: what was gone back to is sick, and says so."""
    world = started(0, 6.0, steps=300, margin_steps=1)
    world.data.bad = (100 * BATCH, 160 * BATCH)
    world.run(3000)
    assert [(e.alarm, e.rung) for e in world.events(InstabilitySeen)] == [("rise", "replay")] * 2
    assert [p.verdict for p in world.events(DataProbed)] == ["bad state", "bad data"]
    assert set(batches_of(world)).isdisjoint(range(100, 160))
    assert world.events(RunFinished)


def test_ranks_that_have_to_begin_again_look_all_the_same() -> None:
    world = started(26, memory_every_steps=0, every_steps=5)
    world.run(3000)
    assert [p.verdict for p in world.events(DataProbed)] == ["bad data"]
    assert [e.rung for e in world.events(InstabilitySeen)] == ["replay"]
    assert set(batches_of(world)).isdisjoint(range(FROM, FROM + 26))
    assert world.events(RunFinished)


@pytest.mark.parametrize("effects", range(40))
def test_a_supervisor_may_die_between_any_two_things_it_does(effects: int) -> None:
    """Between the alarm and the pass: what was found and not yet acted upon is acted upon."""
    world = started(26)
    world.until_step(FROM + 2)
    world.lives = effects
    for _ in range(40):
        if world.core is None:
            world.start_supervisor()
        world.second()
    world.lives = None
    if world.core is None:
        world.start_supervisor()
    world.run(3000)
    assert world.events(RunFinished)
    assert set(batches_of(world)).isdisjoint(range(FROM, FROM + 26))
    assert [p.verdict for p in world.events(DataProbed)] == ["bad data"]
    assert [e.rung for e in world.events(InstabilitySeen)] == ["replay"]
    names = [entry.attempt for entry in world.entries(AttemptStarted)]
    assert len(set(names)) == len(names)


def test_a_supervisor_that_only_advises_leaves_it_at_saying_so() -> None:
    """One that could act has died between the finding and the order."""
    world = started(26)
    world.until(OrderGiven)
    world.kill_supervisor()
    world.config = replace(world.config, stability=replace(world.config.stability, mode="advise"))
    world.start_supervisor()
    world.until(ActionWithheld)
    [withheld, *_] = world.events(ActionWithheld)
    assert (withheld.action, withheld.mode) == ("stability/bad_data", "advise")
    assert "samples are left out" in withheld.response
    assert len(world.events(OrderGiven)) == 1
