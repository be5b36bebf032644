"""A learning rate that is too high from the start, and one that was lowered and is given back:
whole runs in the simulated world."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from opt_logbook.record.events import AttemptStarted, CheckpointCommitted, OrderGiven
from opt_logbook.record.node_events import ActionWithheld
from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen, RollbackBegan

from opt_train.optim.in_force import in_force
from opt_train.protocol.orders import LedgerEntry, ScaleLr
from opt_train.run.instability import APART_STEPS, LrCut, lr_cut_after
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig
from opt_train.stability.ladder import Rung
from opt_train.stability.update_scale import whole_over_sample

RUN: dict[str, Any] = {
    "memory_every_steps": 5,
    "memory_keep": 10,
    "every_steps": 50,
    "steps": 900,
}
RATE = 1e-3
USUAL = {"update_ratio": 1e-3, "lr": RATE, "activation_norm": 20.0}
HORIZON = 40


def started(step: int, modes: str = "", **changes: Any) -> World:
    stability = StabilityConfig(mode="act", horizon_steps=HORIZON, modes=modes)
    config = make_config(**RUN | changes)
    optim = replace(config.optim, warmup_steps=100)
    world = World(replace(config, optim=optim, stability=stability))
    world.start_supervisor()
    world.durations = dict(USUAL)
    return world.until_step(step, seconds=4000)


def rungs(world: World) -> list[tuple[int, str, str]]:
    return [(e.number, e.alarm, e.rung) for e in world.events(InstabilitySeen)]


@pytest.mark.parametrize(
    ("memory", "step"), [(5, 20), (0, 20), (5, 70)], ids=["in place", "anew", "not kept any more"]
)
def test_a_rate_too_high_from_the_start_begins_again_with_a_lower_one(
    memory: int, step: int
) -> None:
    world = started(step - 10, memory_every_steps=memory)
    ratio = 0.12 / whole_over_sample(world.config)
    world.durations |= {"update_ratio": ratio}
    world.until_step(step, seconds=1000)
    world.durations |= {"activation_norm": 400.0}
    world.until(InstabilitySeen, seconds=1000)
    world.until(OrderGiven, seconds=1000)
    world.durations = dict(USUAL)
    world.until(AttemptStarted, count=2, seconds=1000)
    back = world.entries(AttemptStarted)[1]
    assert back.step == 0
    in_place = memory > 0 and step < 50
    assert (back.event.rollback > 0) is in_place
    assert bool(world.events(RollbackBegan)) is not in_place
    assert (back.event.checkpoint == "") is not in_place
    if step > 50:
        assert world.events(CheckpointCommitted), "there was another to begin from"
    world.until(InstabilityClosed, seconds=1000)
    [seen] = world.events(InstabilitySeen)
    assert (seen.alarm, seen.rung) == ("ceiling_at_start", "restart")
    assert "from the beginning, with the learning rate times" in seen.response
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["helped"]
    [entry] = world.replayed.ledger
    assert isinstance(entry, LedgerEntry)
    assert isinstance(entry.order, ScaleLr)
    assert entry.step == 0
    # The same ratio for eight steps of a warm-up of 100, at whose end it would be larger.
    factor = max(0.02, 0.1 * (step - 3.5) / 100)
    assert entry.order.factor == pytest.approx(factor, rel=0.05)
    without = in_force(world.config, (), 100)["lr"]
    now = in_force(world.config, world.replayed.ledger, 100)["lr"]
    assert now == pytest.approx(entry.order.factor * without)
    # It was the rate that was wrong: nothing of it is given back.
    assert world.replayed.lr_cut is None


def test_twice_and_then_a_person() -> None:
    world = started(10)
    world.durations = {**USUAL, "activation_norm": 400.0}
    world.run(3000)
    assert [rung for *_, rung in rungs(world)] == ["restart", "restart", "hand_over"]
    assert "a person must decide" in world.replayed.stopped_by


def lowered(**changes: Any) -> World:
    """A run whose rate was lowered to a tenth, which has helped."""
    world = started(150, **changes)
    world.durations = {**USUAL, "update_ratio": 1e-2}
    for count in (1, 2):
        world.until(InstabilitySeen, count=count, seconds=1000)
        if count == 1:
            world.until(AttemptStarted, count=2, seconds=1000)
    world.durations = {**USUAL, "update_ratio": 1.4e-4, "lr": RATE / 10}
    world.until(InstabilityClosed, seconds=1000)
    assert [rung for *_, rung in rungs(world)] == ["replay", "lower_lr"]
    assert world.replayed.lr_cut is not None
    assert world.replayed.lr_cut.factor == pytest.approx(0.1, rel=0.02)
    return world


def follow(world: World, count: int) -> None:
    """Let ranks train at the rate in force once `count` instabilities have been opened."""
    world.until(InstabilitySeen, count=count, seconds=3000)
    cut = world.replayed.lr_cut
    assert cut is not None
    world.durations = {**USUAL, "update_ratio": 1.4e-3 * cut.factor, "lr": RATE * cut.factor}


def test_a_rate_that_is_not_needed_is_given_back_step_by_step() -> None:
    world = lowered()
    for count in range(3, 7):
        follow(world, count)
    world.until(InstabilityClosed, count=5, seconds=1000)
    world.run(4000)
    given = [e for e in world.entries(InstabilitySeen) if e.event.rung == "give_back"]
    assert [round(e.event.lr_factor, 2) for e in given[:3]] == [2.0, 2.0, 2.0]
    assert given[3].event.lr_factor == pytest.approx(1.25, rel=0.03)
    assert len(given) == 4
    steps = [e.step or 0 for e in given]
    assert all(after - before >= HORIZON for before, after in pairwise(steps))
    assert {c.outcome for c in world.events(InstabilityClosed)} == {"helped"}
    cut = world.replayed.lr_cut
    assert cut is not None
    assert cut.factor == pytest.approx(1.0)
    product = 1.0
    for entry in world.replayed.ledger:
        assert isinstance(entry.order, ScaleLr)
        product *= entry.order.factor
    assert product == pytest.approx(1.0)
    assert len(world.events(AttemptStarted)) == 3, "nothing is gone back for it"


def test_a_rate_that_is_needed_stays_and_that_is_said_once() -> None:
    world = started(150)
    world.durations = {**USUAL, "update_ratio": 3e-2}
    world.until(InstabilitySeen, count=2, seconds=1000)
    # What is too large by 30 is so at every rate.
    world.durations = {**USUAL, "update_ratio": 1e-3, "lr": RATE / 30}
    world.until(InstabilityClosed, count=2, seconds=1000)
    world.run(4000)
    closed = world.events(InstabilityClosed)
    assert [c.outcome for c in closed] == ["helped", "kept"]
    assert "updates are still 30.0 times as large as before" in closed[1].what
    assert len(rungs(world)) == 2
    assert world.replayed.lr_cut is not None
    assert world.replayed.lr_cut.kept


def test_what_was_raised_is_taken_again_on_a_relapse_and_then_stays() -> None:
    world = lowered()
    world.until(InstabilitySeen, count=3, seconds=3000)
    world.durations = {**USUAL, "update_ratio": 1.4e-4, "lr": RATE / 10, "activation_norm": 200.0}
    world.until(InstabilitySeen, count=4, seconds=1000)
    world.durations = {**USUAL, "update_ratio": 1.4e-4, "lr": RATE / 10}
    world.until(InstabilityClosed, count=2, seconds=1000)
    world.run(4000)
    assert rungs(world)[2:] == [(2, "lr_cut", "give_back"), (2, "activation_jump", "take_again")]
    raised, taken = (entry.step or 0 for entry in world.entries(InstabilitySeen)[2:])
    back = world.entries(AttemptStarted)[-1]
    assert back.event.rollback
    assert (back.step or 0) <= raised - 12 < taken
    cut = world.replayed.lr_cut
    assert cut is not None
    assert cut.kept
    assert cut.factor == pytest.approx(0.1, rel=0.02)
    rate = in_force(world.config, world.replayed.ledger, 800)["lr"]
    assert rate == pytest.approx(0.1 * in_force(world.config, (), 800)["lr"], rel=0.02)


@pytest.mark.parametrize("effects", range(4, 9))
def test_a_supervisor_may_die_while_it_takes_a_raise_again(effects: int) -> None:
    """From the alarm's line in the journal on: the alarm itself is not seen again."""
    world = lowered()
    world.until(InstabilitySeen, count=3, seconds=3000)
    world.durations = {**USUAL, "update_ratio": 1.4e-4, "lr": RATE / 10, "activation_norm": 200.0}
    world.lives = effects
    for _ in range(30):
        if world.core is None:
            world.start_supervisor()
        world.second()
        if len(world.events(InstabilitySeen)) == 4:
            world.durations = {**USUAL, "update_ratio": 1.4e-4, "lr": RATE / 10}
    world.lives = None
    if world.core is None:
        world.start_supervisor()
    world.run(4000)
    assert rungs(world)[2:4] == [(2, "lr_cut", "give_back"), (2, "activation_jump", "take_again")]
    rate = in_force(world.config, world.replayed.ledger, 800)["lr"]
    assert rate == pytest.approx(0.1 * in_force(world.config, (), 800)["lr"], rel=0.02)


def test_on_a_leash_it_is_only_said() -> None:
    world = lowered(modes="lr_cut=advise")
    world.until(ActionWithheld, seconds=2000)
    world.run(4000)
    [withheld] = world.events(ActionWithheld)
    assert withheld.action == "stability/lr_cut"
    assert "it is given back in part, times 2" in withheld.response
    assert len(rungs(world)) == 2


def seen(rung: Rung, factor: float) -> InstabilitySeen:
    return InstabilitySeen(1, "rise", "", rung, "", "", 2.0, lr_factor=factor)


def test_cuts_multiply_and_what_came_again_is_kept() -> None:
    cut = lr_cut_after(None, seen(Rung.LOWER_LR, 0.5), 100)
    cut = lr_cut_after(cut, seen(Rung.LOWER_LR, 0.5), 120)
    assert cut == LrCut(0.25, 100, 120)
    assert lr_cut_after(cut, seen(Rung.REPLAY, 1.0), 130) == cut
    raised = lr_cut_after(cut, seen(Rung.GIVE_BACK, 4.0), 200)
    assert raised == LrCut(1.0, 100, 200, 4.0)
    assert not raised.may_be_given_back
    again = lr_cut_after(raised, seen(Rung.LOWER_LR, 0.5), 300)
    assert again == LrCut(0.5, 300, 300, kept=True)
    later = 200 + APART_STEPS
    assert lr_cut_after(raised, seen(Rung.LOWER_LR, 0.5), later) == LrCut(0.5, later, later)
    assert lr_cut_after(cut, seen(Rung.TAKE_AGAIN, 0.5), 210) == LrCut(0.125, 100, 210, kept=True)
    assert lr_cut_after(None, seen(Rung.RESTART, 0.1), 20) is None
