"""A node that was out stands by again once it has passed a preflight, and no other does."""

import pytest
from opt_logbook.record.events import (
    AttemptStarted,
    NodeFailed,
    NodePromoted,
    PlaceVacated,
    RunHalted,
)
from opt_logbook.record.node_events import ActionWithheld, NodeReturned

from opt_train.protocol.commands import Leave
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.simulation.world import World
from opt_train.supervisor.effects import RequestNodes, Send, StartAgent
from opt_train.supervisor.rules.returns import START_SECONDS
from tests.supervisor.started import a_run, code_of


def asked(world: World) -> list[str]:
    return [node for _, node in world.preflights.asked]


def test_a_node_that_was_lost_and_passes_its_preflight_stands_by_and_trains_again() -> None:
    world = a_run(steps=90, return_seconds=20.0).until_step(4)
    world.lose_node("n1")
    world.until(NodeReturned)
    [failed], [returned] = world.entries(NodeFailed), world.entries(NodeReturned)
    assert returned.event == NodeReturned("n1", 5, 1.0)
    assert returned.time - failed.time >= 20.0
    assert world.replayed.nodes["n1"].role == "buffer"
    world.lose_node("n0")
    world.run()
    assert world.events(NodePromoted)[-1] == NodePromoted("n1", "n0", 2)
    assert world.events(AttemptStarted)[-1].nodes == ("n1", "n2")
    assert code_of(world) == DONE


def test_nobody_is_tested_where_it_was_not_asked_for() -> None:
    world = a_run(steps=60).until_step(4)
    world.lose_node("n1")
    world.run()
    assert asked(world) == []
    assert world.events(NodeReturned) == []


@pytest.mark.parametrize("detail", ["uncontained", "remap_failed"])
def test_bad_hardware_is_not_handed_back_however_it_does(detail: str) -> None:
    world = a_run(steps=60, return_seconds=5.0).until_step(4)
    world.publish_finding("n1", "gpu_ecc", detail)
    world.run()
    assert [failed.node for failed in world.events(NodeFailed)] == ["n1"]
    assert not [e for e in world.effects if e == StartAgent("n1")][1:], "but at the start"
    assert world.events(NodeReturned) == []
    assert code_of(world) == DONE


def test_a_node_that_fails_its_preflight_stays_out_and_its_agent_leaves() -> None:
    world = a_run(steps=90, return_seconds=10.0).until_step(4)
    world.preflights.sick["n1"] = ("silent_corruption", "preflight: matmul")
    world.lose_node("n1")
    world.run()
    assert asked(world) == ["n1"], "what it found speaks against it for good"
    assert world.events(NodeReturned) == []
    assert [e for e in world.effects if isinstance(e, Send) and isinstance(e.command, Leave)]
    assert code_of(world) == DONE


def test_one_that_does_not_answer_is_sent_away_and_tried_again() -> None:
    world = a_run(steps=250, return_seconds=10.0, seconds=20.0).until_step(4)
    world.preflights.mute.add("n1")
    world.lose_node("n1")
    world.until_step(40)
    assert asked(world) == ["n1"]
    world.preflights.mute.clear()
    world.run()
    assert asked(world) == ["n1", "n1"]
    assert [returned.node for returned in world.events(NodeReturned)] == ["n1"]


def test_one_whose_agent_dies_at_once_is_tried_again_without_waiting_for_its_tests() -> None:
    """As where the scheduler still shows the step of a node that lost power, and starts no other
    beside it: then the trial has not even begun."""
    world = a_run(steps=250, return_seconds=10.0, seconds=600.0).until_step(4)
    world.lose_node("n1")

    def starts() -> int:
        return world.effects.count(StartAgent("n1"))

    while starts() < 2:
        world.second()
    world.lose_node("n1")
    ended = world.now
    while starts() < 3:
        world.second()
    assert 10.0 <= world.now - ended <= START_SECONDS + 2.0
    world.run()
    assert [returned.node for returned in world.events(NodeReturned)] == ["n1"]


def test_a_node_that_is_out_twice_stays_out() -> None:
    world = a_run(steps=150, return_seconds=10.0).until_step(4)
    world.lose_node("n1")
    world.until(NodeReturned)
    world.lose_node("n1")
    world.run()
    assert [failed.node for failed in world.events(NodeFailed)] == ["n1", "n1"]
    assert len(world.events(NodeReturned)) == 1
    assert code_of(world) == DONE


@pytest.mark.parametrize("boundary", range(0, 30, 2))
def test_a_supervisor_s_death_at_any_moment_of_a_trial_hands_nothing_back_untested(
    boundary: int,
) -> None:
    world = a_run(steps=120, return_seconds=10.0).until_step(4)
    world.lose_node("n1")
    world.until(NodeFailed)
    for _ in range(9):
        world.second()
    world.lives = boundary
    for _ in range(20):
        world.second()
    if world.core is None:
        world.start_supervisor()
    world.lives = None
    world.run()
    assert [returned.node for returned in world.events(NodeReturned)] == ["n1"]
    assert code_of(world) == DONE


def test_a_returned_node_goes_back_to_its_own_place_where_that_is_vacant() -> None:
    world = a_run(steps=150, nodes=3, buffer_nodes=0, min_nodes=2, return_seconds=10.0).until_step(
        4
    )
    world.lose_node("n1")
    world.until(PlaceVacated)
    world.run()
    assert world.events(NodePromoted) == [NodePromoted("n1", "n1", 0)]
    assert [s.nodes for s in world.events(AttemptStarted)] == [
        ("n0", "n1", "n2"),
        ("n0", "n2"),
        ("n0", "n1", "n2"),
    ]
    assert code_of(world) == DONE


def test_a_returned_node_takes_another_place_and_leaves_its_own_to_who_has_it() -> None:
    """Its own place goes by its name, and is another's by now."""
    world = a_run(steps=200, nodes=3, buffer_nodes=1, return_seconds=10.0).until_step(4)
    world.lose_node("n0")
    world.until(NodeReturned)
    assert world.events(AttemptStarted)[-1].nodes == ("n3", "n1", "n2")
    world.lose_node("n2")
    world.until_step(60)
    assert world.events(AttemptStarted)[-1].nodes == ("n3", "n1", "n0")
    world.lose_node("n0")
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n3", "n1", "n2")
    assert code_of(world) == DONE


def test_a_leashed_robot_says_whom_it_would_test() -> None:
    world = a_run(
        steps=60, mode="advise", modes="node_failure=act", return_seconds=10.0
    ).until_step(4)
    world.lose_node("n1")
    world.run()
    [withheld] = world.events(ActionWithheld)
    assert (withheld.action, withheld.nodes) == ("return", ("n1",))
    assert asked(world) == []


def test_what_the_scheduler_took_back_has_not_failed() -> None:
    """At the end of an allocation all of its nodes are down at once: that is no offence of
    theirs."""
    world = a_run(steps=60, kind="local", buffer_nodes=0).until_step(4)
    world.lose_node("n1", "Slurm job 7 is CANCELLED")
    world.scheduler.taken_back.add("n1")
    world.run()
    assert [failed.cause for failed in world.events(NodeFailed)] == ["preemption"]
    assert world.replayed.offences == ()
    assert len(world.events(RunHalted)) == 1
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_scheduler_that_took_it_away_is_asked_for_it_once_it_may_return() -> None:
    """Slurm takes a node that went down out of the allocation."""
    world = a_run(kind="slurm", steps=90, return_seconds=20.0).until_step(4)
    world.lose_node("n1")
    world.run()
    asked_for = [e for e in world.effects if isinstance(e, RequestNodes)]
    assert [request.failed for request in asked_for[:2]] == [("n1",), ()]


def test_nobody_asks_for_bad_hardware_again() -> None:
    world = a_run(kind="slurm", steps=90, return_seconds=20.0).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "uncontained")
    world.run()
    asked_for = [e for e in world.effects if isinstance(e, RequestNodes)]
    assert {request.failed for request in asked_for} == {("n1",)}
