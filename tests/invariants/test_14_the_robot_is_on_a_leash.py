"""Invariant 14: in `observe` and `advise` the journal says what would have been done, and nothing
is done."""

import pytest
from opt_logbook.record.events import (
    AttemptStarted,
    FindingNoted,
    IncidentDiagnosed,
    NodeFailed,
    NodePromoted,
    PlaceVacated,
    RunHalted,
)
from opt_logbook.record.node_events import ActionWithheld, GrowthBegan, ReplacementBegan

from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.run.state import Stage
from opt_train.simulation.actors import make_config
from opt_train.simulation.histories import History
from opt_train.simulation.world import World
from opt_train.supervisor.effects import RequestNodes
from tests.supervisor.started import a_run, code_of

LEASHED = ["observe", "advise"]


@pytest.mark.parametrize("mode", LEASHED)
def test_a_run_that_has_failed_waits_for_a_person(mode: str) -> None:
    world = a_run(steps=30, mode=mode).until_step(4)
    world.lose_node("n1")
    world.run()
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert diagnosed.action.startswith(f"nothing is done in mode {mode}; it would be: take n1 out")
    (halted,) = world.events(RunHalted)
    assert "take n1 out" in halted.question
    assert "Do it, then start the run again" in halted.question
    assert world.events(NodeFailed) == world.events(NodePromoted) == []
    assert code_of(world) == PERSON_MUST_DECIDE


def test_only_the_cause_that_is_named_is_on_the_leash() -> None:
    world = a_run(steps=30, modes="gpu_ecc=observe").until_step(4)
    world.publish_finding("n0", "gpu_ecc", "uncontained")
    world.until_step(8)
    assert [noted.mode for noted in world.events(FindingNoted)] == ["observe"]
    assert world.replayed.stage is Stage.TRAINING, "it trains on"
    world.lose_node("n1")
    world.run()
    assert world.events(AttemptStarted)[1].nodes == ("n0", "n2")
    assert code_of(world) == DONE


@pytest.mark.parametrize("mode", LEASHED)
def test_no_swap_is_planned(mode: str) -> None:
    world = a_run(steps=20, modes=f"preemption/drain={mode}").until_step(4)
    world.scheduler.draining["n1"] = "new DIMM"
    world.run()
    (noted,) = world.events(FindingNoted)
    assert noted.response.startswith(f"nothing is done in mode {mode}; it would be: train on;")
    assert world.events(ReplacementBegan) == world.events(NodeFailed) == []
    assert code_of(world) == DONE


def test_a_buffer_node_that_goes_down_is_said_to_be_out_once() -> None:
    world = a_run(steps=30, modes="node_failure=advise").until_step(4)
    world.lose_node("n2")
    world.run()
    assert world.events(ActionWithheld) == [
        ActionWithheld(
            "take_out",
            ("n2",),
            "advise",
            "nothing is done in mode advise; it would be: take n2 out",
        )
    ]
    assert world.events(NodeFailed) == []
    assert code_of(world) == DONE


def test_a_node_that_does_not_come_is_for_a_person() -> None:
    world = World(make_config(mode="advise"))
    world.scheduler.down["n1"] = "no power"
    world.start_supervisor()
    world.agents.pop("n1", None)
    world.starting = [item for item in world.starting if item[1] != "n1"]
    world.run()
    (halted,) = world.events(RunHalted)
    assert "n1 should train, and did not come or went down; nothing is done in mode advise" in (
        halted.question
    )
    assert world.events(NodeFailed) == []
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_person_who_lets_go_of_the_leash_sees_the_finding_answered() -> None:
    world = a_run(steps=60, modes="gpu_ecc=observe").until_step(4)
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.until_step(6)
    world.ask_stop()
    world.run()
    world.config = make_config(steps=60)
    world.start_supervisor()
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.run()
    assert [noted.mode for noted in world.events(FindingNoted)] == ["observe", "act"]
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n2")


def test_nodes_that_are_missing_are_not_asked_for_and_those_that_come_not_taken_in() -> None:
    """What no cause asks for is on the leash of all."""
    world = a_run(steps=60, kind="slurm", nodes=3, buffer_nodes=0, min_nodes=2).until_step(4)
    world.lose_node("n2")
    world.until(PlaceVacated)
    world.until_step(8)
    world.kill_supervisor()
    world.effects.clear()
    world.config = make_config(
        steps=60, kind="slurm", nodes=3, buffer_nodes=0, min_nodes=2, mode="observe"
    )
    world.start_supervisor()
    world.names = (*world.names, "e9")
    world.run()
    assert not [e for e in world.effects if isinstance(e, RequestNodes)]
    withheld = world.events(ActionWithheld)
    assert {(w.action, w.nodes) for w in withheld} >= {("grow", ("e9",))}
    assert world.events(GrowthBegan) == []
    assert code_of(world) == DONE


SEEDS = 40


def test_no_seed_makes_a_leashed_robot_act() -> None:
    """The disasters of the simulation: ranks may restart nowhere, nodes go nowhere."""
    for seed in range(SEEDS):
        history = History(seed, mode="observe")
        world = history.run()
        assert world.events(NodeFailed) == world.events(NodePromoted) == []
        assert world.events(PlaceVacated) == world.events(GrowthBegan) == []
