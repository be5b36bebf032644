"""Invariant 7: every intervention carries its reason, what is expected of it and, later, what came
of it; the learning rate never exceeds the schedule; behind the last rung a person decides."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opt_logbook.record.events import OrderEnded, OrderGiven, RunStopped
from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from opt_train.config.run_config import RunConfig
from opt_train.optim.config import OptimConfig
from opt_train.optim.in_force import in_force
from opt_train.protocol.orders import LedgerEntry, ScaleLr
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig
from opt_train.train.config import TrainConfig

ACTING = StabilityConfig(mode="act", horizon_steps=40)
RUN: dict[str, Any] = {"memory_every_steps": 5, "memory_keep": 10, "every_steps": 50, "steps": 320}
WELL = {"update_ratio": 1e-3, "loss": 3.0}
SICK: dict[str, dict[str, float]] = {
    "updates too large": {"update_ratio": 1e-2, "loss": 3.0},
    "updates too small": {"update_ratio": 1e-5, "loss": 3.0},
    "not finite": {"update_ratio": 1e-3, "loss": float("nan")},
    "the loss rises": {"update_ratio": 1e-3, "loss": 6.0},
}
"""What metrics lines say then."""


def begin() -> World:
    world = World(replace(make_config(**RUN), stability=ACTING))
    world.start_supervisor()
    world.durations = dict(WELL)
    return world.until_step(150, seconds=2000)


@pytest.mark.parametrize("lasts", [False, True], ids=["an event", "for good"])
@pytest.mark.parametrize("sickness", SICK)
def test_the_journal_says_why_what_for_and_what_came_of_it(sickness: str, *, lasts: bool) -> None:
    world = begin()
    world.durations = SICK[sickness]
    world.until(InstabilitySeen)
    if not lasts:
        world.durations = dict(WELL)
    world.run(3000)
    seen = world.events(InstabilitySeen)
    assert seen
    for event in seen:
        assert event.what
        assert event.response
        assert "before step" in event.expectation
    # One end each, and it says how.
    closed = world.events(InstabilityClosed)
    assert [event.number for event in closed] == sorted({event.number for event in seen})
    assert {event.outcome for event in closed} <= {"helped", "handed over"}
    assert all(event.what for event in closed)
    given = world.events(OrderGiven)
    assert given
    assert all(event.reason for event in given)
    ended = {event.number for event in world.events(OrderEnded)}
    assert {event.number for event in given} <= ended
    handed_over = closed[-1].outcome == "handed over"
    assert handed_over == lasts
    if handed_over:
        assert "a person must decide" in world.replayed.stopped_by
        assert world.events(RunStopped)


@given(
    factors=st.lists(st.floats(0.01, 100.0), max_size=6),
    steps=st.lists(st.integers(0, 999), min_size=6, max_size=6),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    at=st.integers(0, 999),
)
def test_the_learning_rate_never_exceeds_the_schedule(
    factors: list[float], steps: list[int], schedule: str, at: int
) -> None:
    config = RunConfig(train=TrainConfig(steps=1000), optim=OptimConfig(schedule=schedule))
    ledger = tuple(
        LedgerEntry(step, ScaleLr(number, "tried", factor))
        for number, (factor, step) in enumerate(zip(factors, sorted(steps), strict=False), start=1)
    )
    assert in_force(config, ledger, at)["lr"] <= in_force(config, (), at)["lr"]
