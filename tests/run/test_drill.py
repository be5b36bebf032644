"""What a drill reports is read from the journal alone: a wrong number here would be believed."""

import pytest
from opt_logbook.record.events import TrainingBegan

from opt_train.protocol.exits import BadInput
from opt_train.run.drill import DrillOutcome, buffers_of, choose_victim, outcome_of
from opt_train.simulation.world import World
from tests.supervisor.started import a_run


def drilled(world: World, node: str) -> tuple[float, int]:
    """Kills the node; returns the time, and the newest line of the journal before that."""
    world.lose_node(node)
    return world.now, world.journal[-1].seq


def test_a_node_that_is_replaced_is_told_from_kill_to_first_step() -> None:
    world = a_run(steps=30).until_step(5)
    killed, before = drilled(world, "n1")
    world.until(TrainingBegan, count=2)
    since = [entry for entry in world.journal if entry.seq > before]
    outcome = outcome_of("n1", killed, since)
    assert (outcome.cause, outcome.buffer_node) == ("node_failure", "n2")
    assert (outcome.restarted_from, outcome.training_went_on) == (3, True)
    assert 0 < (outcome.steps_lost or 0) <= 3
    assert 0 <= (outcome.detected_seconds or 0) <= (outcome.training_seconds or 0)
    assert outcome.training_seconds == round(since[-1].time - killed, 3)
    # Before it has happened, nothing is claimed.
    assert outcome_of("n1", killed, []) == DrillOutcome("n1")
    assert not outcome_of("n1", killed, since[:-1]).training_went_on


def test_a_run_that_stops_for_a_person_is_no_success() -> None:
    world = a_run(steps=30).until_step(4)
    world.lose_node("n2")
    world.second()
    killed, before = drilled(world, "n1")
    world.run()
    outcome = outcome_of("n1", killed, [e for e in world.journal if e.seq > before])
    assert not outcome.training_went_on
    assert "no buffer node is left" in outcome.question


def test_the_last_node_is_killed_unless_another_is_named() -> None:
    state = a_run(steps=30).until_step(4).replayed
    assert buffers_of(state) == ["n2"]
    assert choose_victim(state, "", 2) == "n1"
    assert choose_victim(state, "n0", 2) == "n0"
    with pytest.raises(BadInput, match="--node n2 does not train; use one of n0, n1"):
        choose_victim(state, "n2", 2)


def test_a_drill_that_would_end_the_run_is_refused() -> None:
    state = a_run(steps=30, buffer_nodes=0).until_step(4).replayed
    with pytest.raises(BadInput, match=r"no buffer node .* cluster\.buffer_nodes=1"):
        choose_victim(state, "", 2)
    assert choose_victim(state, "", 1) == "n1", "the run goes on with one node"


def test_a_run_that_does_not_train_is_not_drilled() -> None:
    world = a_run(steps=9)
    world.run()
    with pytest.raises(BadInput, match="the run is finished"):
        choose_victim(world.replayed, "", 2)
