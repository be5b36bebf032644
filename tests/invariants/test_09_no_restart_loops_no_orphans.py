"""Invariant 9: restarts are budgeted by progress; the same cause without progress escalates, then
stops; no orphans."""

import pytest
from opt_logbook.record.events import AttemptStarted, NodeFailed, RunHalted

from opt_train.protocol.exits import PERSON_MUST_DECIDE
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World


def poisoned(step: int, line: str) -> World:
    world = World(make_config())
    world.poison = (step, line)
    world.start_supervisor()
    return world.run()


def test_a_users_bug_is_tried_once_more_and_then_a_person_is_asked() -> None:
    world = poisoned(1, "ValueError: too many values to unpack")
    assert len(world.events(AttemptStarted)) == 2
    (halted,) = world.events(RunHalted)
    assert halted.cause == "user_code"
    assert "ValueError" in halted.question
    assert world.finish is not None
    assert world.finish.code == PERSON_MUST_DECIDE
    assert world.events(NodeFailed) == [], "hardware is not blamed for a user's bug"


def test_progress_renews_the_budget_and_a_loop_behind_it_still_ends() -> None:
    """Passing a checkpoint is progress; coming to the same step again and again is not."""
    world = poisoned(7, "RuntimeError: CUDA error: an illegal memory access was encountered")
    assert len(world.events(AttemptStarted)) == 3
    assert world.events(RunHalted)[0].cause == "illegal_access"


def test_killed_again_and_again_replaces_the_node_before_it_stops() -> None:
    world = World(make_config())
    world.start_supervisor()
    for attempt in range(1, 5):
        world.until(AttemptStarted, attempt)
        world.until_step(1)
        world.kill_rank(0)
        world.second()
    world.run()
    assert [n.node for n in world.events(NodeFailed)] == ["n0"]
    assert "killed struck 4 times" in world.events(RunHalted)[0].question


def test_a_new_supervisor_does_not_renew_the_budget() -> None:
    """A loop that kills its supervisor too would never end."""
    world = World(make_config())
    world.poison = (1, "ValueError: no")
    world.start_supervisor()
    world.until(AttemptStarted, 2)
    world.kill_supervisor()
    world.second()
    world.start_supervisor()
    world.run()
    assert world.events(RunHalted)[0].cause in ("user_code", "none")
    assert len(world.events(AttemptStarted)) <= 3


@pytest.mark.parametrize("end", ["finished", "stopped", "halted"])
def test_nothing_of_a_run_outlives_it(end: str) -> None:
    world = World(make_config())
    world.poison = (1, "ValueError: no") if end == "halted" else None
    world.start_supervisor()
    if end == "stopped":
        world.until_step(4)
        world.ask_stop()
    world.run()
    assert world.replayed.stage == end
    assert world.ranks() == []
    assert world.agents == {}
