"""Who is tested when: a buffer node that is broken must be known before it is needed, and nothing
that trains, or is about to, may be disturbed for it."""

from itertools import pairwise

import pytest
from opt_logbook.record.events import (
    AttemptStarted,
    FailureSeen,
    FindingNoted,
    NodeFailed,
    NodePromoted,
)

from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.simulation.world import World
from opt_train.supervisor.rules.preflights import SPARE_SECONDS
from tests.supervisor.started import a_run, code_of


def asked(world: World) -> list[str]:
    """Nodes that were asked to be tested, in order."""
    return [node for _, node in world.preflights.asked]


def test_nothing_is_tested_where_nobody_asked_for_it() -> None:
    world = a_run(steps=30)
    world.run()
    assert asked(world) == []
    assert code_of(world) == DONE


def test_a_buffer_node_is_tested_once_when_it_has_come() -> None:
    world = a_run(steps=30, on_arrival=True)
    world.run()
    assert asked(world) == ["n2"]
    assert world.events(FindingNoted) == []
    assert code_of(world) == DONE


@pytest.mark.parametrize(
    "found", [("silent_corruption", "preflight: matmul"), ("storage", "node_disk")]
)
def test_a_buffer_node_that_fails_its_preflight_is_taken_out(found: tuple[str, str]) -> None:
    world = a_run(steps=30, on_arrival=True)
    world.preflights.sick["n2"] = found
    world.until_step(4)
    assert world.events(NodeFailed) == [NodeFailed("n2", 0, found[0])]
    assert world.events(FailureSeen) == [], "training was not disturbed"
    world.lose_node("n1")
    world.run()
    assert world.events(NodePromoted) == []
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_full_shared_file_system_takes_no_buffer_node_out() -> None:
    """All nodes would be out at once, for the rest of the run."""
    world = a_run(steps=30, on_arrival=True)
    world.preflights.sick["n2"] = ("storage", "preflight: shared file system")
    world.run()
    assert [noted.node for noted in world.events(FindingNoted)] == ["n2"]
    assert world.events(NodeFailed) == world.events(FailureSeen) == []
    assert code_of(world) == DONE


def test_idle_buffer_nodes_are_tested_again_and_again() -> None:
    world = a_run(steps=40, every_seconds=10.0)
    world.run()
    times = [when for when, _ in world.preflights.asked]
    assert set(asked(world)) == {"n2"}
    assert len(times) >= 4
    assert all(later - now >= 10.0 for now, later in pairwise(times))


def test_a_node_that_was_promoted_is_not_tested_any_more() -> None:
    """The world fails where an agent is asked to test a node that trains."""
    world = a_run(steps=60, on_arrival=True, every_seconds=5.0).until_step(4)
    world.lose_node("n1")
    world.run()
    assert world.events(AttemptStarted)[1].nodes == ("n0", "n2")
    assert code_of(world) == DONE


def test_a_test_that_may_have_been_lost_with_the_link_is_asked_for_again() -> None:
    world = a_run(steps=30, on_arrival=True)
    world.preflights.mute.add("n2")
    world.until_step(2)
    assert asked(world) == ["n2"]
    world.preflights.mute.clear()
    world.cut_link("n2", seconds=2)
    world.run()
    assert asked(world) == ["n2", "n2"]


# Before the run -----------------------------------------------------------------------------------


def test_before_the_run_every_node_is_tested_and_who_fails_does_not_begin() -> None:
    world = a_run(steps=9, before_run=True)
    world.preflights.sick["n0"] = ("silent_corruption", "preflight: matmul")
    world.run()
    assert sorted(asked(world)) == ["n0", "n1", "n2"]
    assert [started.nodes for started in world.events(AttemptStarted)] == [("n2", "n1")]
    assert world.events(FailureSeen) == []
    assert code_of(world) == DONE


def test_a_run_does_not_wait_for_ever_for_a_test() -> None:
    world = a_run(steps=9, before_run=True, seconds=20.0)
    world.preflights.mute.add("n1")
    world.run()
    [began] = world.entries(AttemptStarted)
    first = world.journal[0].time
    assert 20.0 + SPARE_SECONDS <= began.time - first < 20.0 + SPARE_SECONDS + 5.0
    assert code_of(world) == DONE


def test_a_restart_after_a_failure_waits_for_no_test() -> None:
    world = a_run(steps=30, before_run=True).until_step(4)
    world.kill_rank(0)
    world.run()
    assert sorted(asked(world)) == ["n0", "n1", "n2"]
    assert code_of(world) == DONE
