"""The ways in which a run is asked to stop, told to the core by a small world in virtual time."""

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    FailureSeen,
    IncidentClosed,
    Note,
    OrderEnded,
    OrderGiven,
    RunStopped,
)

from opt_train.protocol.exits import DONE, STOPPED
from opt_train.protocol.facts import ExitNotice
from opt_train.run.state import NODES_END
from opt_train.supervisor.inputs import InboxReceived
from tests.supervisor.started import a_run, code_of


def test_a_stop_saves_and_leaves_and_the_same_command_goes_on() -> None:
    world = a_run().until_step(4)
    world.ask_stop()
    world.run()
    (stopped,) = world.events(RunStopped)
    assert (stopped.by, stopped.saved_step) == ("a person", 4)
    assert world.events(OrderGiven) == [OrderGiven(1, "save_and_stop", "a person")]
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
    assert world.events(AttemptEnded)[-1].outcome == "stopped"
    assert code_of(world) == STOPPED
    world.start_supervisor()
    world.run()
    assert world.entries(AttemptStarted)[1].step == 4
    assert code_of(world) == DONE


def test_a_ctrl_c_that_comes_twice_at_once_saves() -> None:
    world = a_run().until_step(4)
    world.ask_stop("SIGINT")
    world.ask_stop("SIGINT")
    world.run()
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
    assert world.events(RunStopped)[0].saved_step == 4


@pytest.mark.parametrize(("by", "hurries"), [("SIGINT", True), ("SIGTERM", False)])
def test_a_second_ctrl_c_does_not_wait_for_the_ranks_and_a_schedulers_second_term_does(
    by: str, hurries: bool
) -> None:
    """Slurm sends TERM before the time limit, and again at the limit, when the ranks may be in the
    middle of a save."""
    world = a_run(minimum_seconds=60.0, step_seconds=60.0).until_step(4)
    world.stop_rank(1)
    world.ask_stop(by)
    for _ in range(3):
        world.second()
    assert world.events(OrderEnded) == []
    world.ask_stop(by)
    for _ in range(10):
        world.second()
    assert world.events(OrderEnded) == ([OrderEnded(1, "withdrawn")] if hurries else [])
    world.run()
    assert world.events(RunStopped)[0].saved_step == 3
    assert code_of(world) == STOPPED


def test_a_stop_that_the_ranks_do_not_take_becomes_a_kill() -> None:
    world = a_run(minimum_seconds=60.0, step_seconds=20.0).until_step(4)
    world.stop_rank(1)
    world.ask_stop()
    world.run(120)
    assert world.events(OrderEnded) == [OrderEnded(1, "withdrawn")]
    assert world.events(RunStopped)[0].saved_step == 3
    assert world.ranks() == []


def test_a_stop_while_nodes_are_awaited_stops_at_once() -> None:
    world = a_run()
    world.ask_stop()
    world.run(5)
    assert world.events(RunStopped) == [RunStopped("a person", -1)]
    assert world.events(AttemptStarted) == []


def test_a_stop_during_recovery_does_not_restart() -> None:
    world = a_run().until_step(5)
    world.kill_rank(1)
    world.until(FailureSeen)
    world.ask_stop()
    world.run(20)
    assert len(world.events(AttemptStarted)) == 1
    assert world.events(IncidentClosed)[0].outcome == "stopped"
    assert world.events(RunStopped)[0].saved_step == 3


def test_a_stop_by_the_inbox_is_the_same_stop_and_a_note_is_journalled() -> None:
    world = a_run().until_step(4)
    world.feed(InboxReceived({"kind": "note", "author": "Ada", "text": "looks fine"}))
    world.feed(InboxReceived({"kind": "stop", "by": "Ada"}))
    world.run()
    assert world.events(Note) == [Note("Ada", "looks fine")]
    assert world.events(RunStopped)[0].by == "Ada"


def test_ranks_that_leave_with_75_by_themselves_are_a_stop_not_a_failure() -> None:
    """SIGTERM by the scheduler reaches the ranks alone; it must not be diagnosed as an incident."""
    world = a_run().until_step(4)
    for rank in (0, 1):
        agent, slot = world.find(rank) or (None, None)
        assert agent is not None
        assert slot is not None
        leaving = ExitNotice(STOPPED, 4, "SIGTERM")
        world.end_rank(agent, slot, code=STOPPED, leaving=leaving)
    world.run(20)
    assert world.events(FailureSeen) == []
    assert world.events(RunStopped)[0].by == "SIGTERM"


@pytest.mark.parametrize(("by", "goes_on"), [(NODES_END, True), ("a person", False)])
def test_only_a_stop_that_is_no_persons_leaves_another_one_waiting(by: str, goes_on: bool) -> None:
    """A person's stop that was taken for a second one was lost, and the run went on with others."""
    world = a_run(steps=60).until_step(4)
    assert world.core is not None
    assert not world.core.goes_on_after_stop
    world.ask_stop(by)
    assert world.core.goes_on_after_stop is goes_on
