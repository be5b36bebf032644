"""Alarms are answered, judged, escalated and kept on a leash: whole runs in the simulated world."""

from dataclasses import replace
from typing import Any

import pytest
from opt_logbook.record.events import AttemptStarted, FailureSeen, OrderGiven, RunFinished
from opt_logbook.record.node_events import ActionWithheld
from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from opt_train.run.state import TERMINAL
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig
from opt_train.stability.ladder import LADDER, Rung

RUN: dict[str, Any] = {
    "memory_every_steps": 5,
    "memory_keep": 10,
    "every_steps": 50,
    "steps": 320,
}
USUAL = {"update_ratio": 1e-3}


def until_step(world: World, step: int) -> World:
    return world.until_step(step, seconds=2000)


def started(mode: str = "act") -> World:
    stability = StabilityConfig(mode=mode, horizon_steps=40)
    world = World(replace(make_config(**RUN), stability=stability))
    world.start_supervisor()
    world.durations = dict(USUAL)
    return until_step(world, 150)


def rungs(world: World) -> list[tuple[int, str, str]]:
    return [(e.number, e.alarm, e.rung) for e in world.events(InstabilitySeen)]


def test_what_does_not_come_again_was_an_event() -> None:
    world = started()
    world.durations = {"update_ratio": 1e-2}
    world.until(InstabilitySeen)
    world.durations = dict(USUAL)
    world.until(AttemptStarted, count=2)
    [seen] = world.entries(InstabilitySeen)
    assert (seen.event.alarm, seen.event.rung) == ("update_jump", "replay")
    assert seen.step is not None
    back = world.entries(AttemptStarted)[1]
    assert back.event.rollback == 1
    assert back.step is not None
    assert 12 <= seen.step - back.step < 12 + 5
    assert f"back to step {back.step}" in seen.event.response
    world.until(InstabilityClosed, seconds=1000)
    [closed] = world.entries(InstabilityClosed)
    assert closed.event.outcome == "helped"
    assert closed.step is not None
    assert closed.step >= seen.step + 40
    assert world.replayed.ledger == ()
    world.run(2000)
    assert world.events(RunFinished)
    assert len(world.events(InstabilitySeen)) == 1


def test_what_comes_again_is_answered_by_the_measured_factor_and_then_by_a_person() -> None:
    world = started()
    world.durations = {"update_ratio": 1e-2}
    world.run(3000)
    assert [rung for *_, rung in rungs(world)] == ["replay", "lower_lr", "lower_lr", "hand_over"]
    assert {number for number, *_ in rungs(world)} == {1}
    factors = [entry.order.factor for entry in world.replayed.ledger]  # type: ignore[attr-defined]
    assert factors == pytest.approx([0.1, 0.1], rel=0.01)
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["handed over"]
    assert "a person must decide" in world.replayed.stopped_by
    steps = [entry.step or 0 for entry in world.entries(AttemptStarted)]
    assert steps[1:] == sorted(steps[1:], reverse=True), "each relapse goes further back"
    assert world.replayed.saved_step == steps[-1] < 138, "what is saved is from before the trouble"
    assert world.replayed.orders_given == 7, "each rollback and change, and the stop"


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_on_a_leash_it_is_said_and_not_done(mode: str) -> None:
    world = started(mode=mode)
    world.durations = {"update_ratio": 1e-2}
    world.until(ActionWithheld)
    [withheld] = world.events(ActionWithheld)
    assert (withheld.action, withheld.mode) == ("stability/update_jump", mode)
    assert "back to step" in withheld.response
    world.run(2000)
    assert world.events(OrderGiven) == world.events(InstabilitySeen) == []
    assert world.events(FailureSeen) == []


def test_a_supervisor_that_dies_in_between_goes_on_with_the_same_trouble() -> None:
    world = started()
    world.durations = {"update_ratio": 1e-2}
    world.until(InstabilitySeen)
    world.durations = dict(USUAL)
    world.kill_supervisor()
    world.start_supervisor()
    world.until(AttemptStarted, count=2)
    world.until(InstabilityClosed, seconds=1000)
    assert [(c.number, c.outcome) for c in world.events(InstabilityClosed)] == [(1, "helped")]
    assert rungs(world) == [(1, "update_jump", "replay")]


@pytest.mark.parametrize("effects", [3, 4, 5, 6, 7, 8, 20, 40])
def test_a_supervisor_may_die_while_it_hands_over(effects: int) -> None:
    """Between the alarm, going back, the order to stop and what became of it: the run stops."""
    world = started()
    world.durations = {"update_ratio": 1e-5}
    world.until(AttemptStarted, count=2, seconds=1000)
    world.lives = effects
    for _ in range(60):
        if world.core is None and world.replayed.stage not in TERMINAL:
            world.start_supervisor()
        world.second()
    world.lives = None
    if world.replayed.stage not in TERMINAL:
        world.run(2000)
    assert [rung for *_, rung in rungs(world)] == ["replay", "hand_over"]
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["handed over"]
    assert "a person must decide" in world.replayed.stopped_by


def dead_between_alarm_and_order() -> World:
    for effects in range(1, 20):
        world = started()
        world.durations = {"update_ratio": 1e-2}
        world.lives = effects
        while world.core is not None:
            world.second()
        if world.events(InstabilitySeen) and not world.events(OrderGiven):
            return world
    raise AssertionError("no supervisor died there")


def test_a_successor_on_a_leash_says_what_it_would_have_ordered_and_what_else_it_sees() -> None:
    world = dead_between_alarm_and_order()
    world.config = replace(world.config, stability=replace(world.config.stability, mode="advise"))
    world.durations = dict(USUAL)
    world.start_supervisor()
    world.until(ActionWithheld, seconds=1000)
    # The one that is on record is open until it is judged.
    world.until_step(185, seconds=1000)
    assert world.events(InstabilityClosed) == []
    world.durations = {"update_ratio": 1e-5}
    world.until(ActionWithheld, count=2, seconds=1000)
    said = [event.action for event in world.events(ActionWithheld)]
    assert said == ["stability/update_jump", "stability/frozen"]
    assert world.events(OrderGiven) == []


def test_every_row_ends_with_a_person() -> None:
    for rows in LADDER.values():
        assert rows[-1] is Rung.HAND_OVER
        assert Rung.HAND_OVER not in rows[:-1]
