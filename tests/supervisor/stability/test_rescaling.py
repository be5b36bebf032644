"""What needs no going back is answered in place, judged, repeated and escalated: whole runs in the
simulated world."""

import math
from dataclasses import replace
from typing import Any

import pytest
from opt_logbook.record.events import AttemptStarted, OrderEnded, OrderGiven
from opt_logbook.record.node_events import ActionWithheld
from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.orders import ScaleEmbeddingGradient, SetLossScale
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig
from opt_train.stability.ladder import ADVICE, LADDER, RESCALES_MAX, Rung

RUN: dict[str, Any] = {
    "memory_every_steps": 5,
    "memory_keep": 10,
    "every_steps": 50,
    "steps": 400,
}
USUAL = {
    "update_ratio": 1e-3,
    "grad_norm": 1.0,
    "embedding_grad_ratio": 1.0,
    "overflow": False,
    "skipped": False,
    "loss_scale": 1024.0,
    "loss_scale_floor": 2.0**-24,
}
SICK = USUAL | {"overflow": True, "skipped": True, "grad_norm": math.inf}
DROWNED = USUAL | {"embedding_grad_ratio": 100.0}


def started(mode: str = "act", compute: str = "fp16", until: int = 150) -> World:
    stability = StabilityConfig(mode=mode, horizon_steps=40)
    precision = PrecisionConfig(compute=compute)
    world = World(replace(make_config(**RUN), stability=stability, precision=precision))
    world.start_supervisor()
    world.durations = dict(USUAL)
    return world.until_step(until, seconds=2000)


def rungs(world: World) -> list[str]:
    return [event.rung for event in world.events(InstabilitySeen)]


def test_a_scale_is_set_anew_where_training_stands() -> None:
    world = started()
    world.durations = dict(SICK)
    world.until(OrderEnded)
    world.durations = dict(USUAL)
    world.until(InstabilityClosed, seconds=1000)
    [seen] = world.entries(InstabilitySeen)
    assert (seen.event.alarm, seen.event.rung) == ("loss_scale_collapse", "rescale")
    assert seen.event.order == 1
    assert "the loss scale is set to 1024 and its floor to 0.03125, in place" in seen.event.response
    [given] = world.events(OrderGiven)
    assert (given.order, given.parameters["scale"]) == ("set_loss_scale", 1024.0)
    [entry] = world.replayed.ledger
    assert entry.order == SetLossScale(1, given.reason, 1024.0, 2.0**-5)
    assert seen.step is not None
    assert seen.step <= entry.step < seen.step + 10
    [closed] = world.entries(InstabilityClosed)
    assert closed.event.outcome == "helped"
    assert closed.step is not None
    assert closed.step >= seen.step + 40
    assert len(world.events(AttemptStarted)) == 1, "no step was trained twice"


def test_what_outlasts_the_rescales_is_answered_by_going_back_and_then_by_a_person() -> None:
    world = started()
    world.durations = dict(SICK)
    world.run(4000)
    expected = ["rescale"] * RESCALES_MAX + ["replay", "lower_lr", "hand_over"]
    assert rungs(world) == expected
    assert {event.number for event in world.events(InstabilitySeen)} == {1}
    steps = [entry.step or 0 for entry in world.entries(InstabilitySeen)][:RESCALES_MAX]
    obeyed = [entry.step for entry in world.replayed.ledger][:RESCALES_MAX]
    for alarm, before in zip(steps[1:], obeyed, strict=False):
        assert alarm > before, "what was trained before the order says nothing of it"
    [factor] = [e.order.factor for e in world.replayed.ledger if hasattr(e.order, "factor")]
    assert factor == pytest.approx(0.3)
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["handed over"]
    assert world.replayed.stopped_by.endswith(ADVICE["loss_scale_collapse"])
    assert "overflowed" in world.replayed.stopped_by


def test_a_supervisor_that_dies_before_the_order_is_obeyed_gives_no_second() -> None:
    world = started()
    world.durations = dict(SICK)
    world.until(InstabilitySeen)
    world.durations = dict(USUAL)
    world.kill_supervisor()
    world.start_supervisor()
    world.until(InstabilityClosed, seconds=1000)
    assert rungs(world) == ["rescale"]
    assert len(world.replayed.ledger) == 1


@pytest.mark.parametrize("step", [0, 60])
def test_what_vanished_in_part_is_given_up_and_trained_again_with_another_scale(step: int) -> None:
    """From the beginning where it has been so all along."""
    world = started(until=step)
    world.durations = USUAL | {"grad_norm": 1e-6, "loss_scale": 2.0**-4}
    world.until(InstabilitySeen, seconds=1000)
    world.until(OrderGiven, seconds=1000)
    world.durations = dict(USUAL)
    world.until(InstabilityClosed, seconds=1000)
    [seen] = world.events(InstabilitySeen)
    assert (seen.alarm, seen.rung, seen.order) == ("partial_underflow", "rescale_back", 0)
    back = world.entries(AttemptStarted)[1]
    [entry] = world.replayed.ledger
    assert isinstance(entry.order, SetLossScale)
    assert entry.order.scale == (1024.0 if step else 2.0**8)
    assert back.step == entry.step
    assert entry.step <= max(0, step - 4)
    assert f"back to step {entry.step}, with the loss scale at" in seen.response
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["helped"]


def test_another_sign_behind_a_rescale_is_answered_by_its_own_first_rung() -> None:
    world = started()
    world.durations = dict(SICK)
    world.until(OrderEnded)
    world.durations = USUAL | {"update_ratio": 1e-2}
    world.until(InstabilitySeen, count=2)
    assert rungs(world) == ["rescale", "replay"]
    world.durations = dict(USUAL)
    world.until(InstabilityClosed, seconds=1000)
    assert [c.outcome for c in world.events(InstabilityClosed)] == ["helped"]
    assert world.replayed.ledger != ()


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_on_a_leash_the_scale_stays(mode: str) -> None:
    world = started(mode=mode)
    world.durations = dict(SICK)
    world.until(ActionWithheld)
    [withheld] = world.events(ActionWithheld)
    assert (withheld.action, withheld.mode) == ("stability/loss_scale_collapse", mode)
    assert "in place" in withheld.response
    world.run(2000)
    assert world.events(OrderGiven) == []


def test_an_embedding_that_drowns_the_rest_is_shrunk_by_as_much_when_it_comes_again() -> None:
    world = started(compute="bf16")
    world.durations = DROWNED | {"loss_scale_floor": None}
    world.until(InstabilitySeen, count=2, seconds=2000)
    world.durations = USUAL | {"loss_scale_floor": None}
    world.until(InstabilityClosed, seconds=1000)
    assert rungs(world) == ["replay", "shrink_embedding"]
    [entry] = world.replayed.ledger
    assert isinstance(entry.order, ScaleEmbeddingGradient)
    assert entry.order.factor == pytest.approx(0.01, rel=0.01)
    assert len(world.events(AttemptStarted)) == 3
    assert "the embedding's gradient times 0.01" in world.events(InstabilitySeen)[1].response


def test_who_rescales_does_so_first() -> None:
    """`answer` takes the rungs behind it by the number of times that something was gone back."""
    for rungs_ in LADDER.values():
        assert Rung.RESCALE not in rungs_[1:]
    assert ADVICE.keys() <= LADDER.keys()
