"""A rollback comes about in any case: in place, by a restart, or by one that a failure makes."""

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    FailureSeen,
    OrderEnded,
    OrderGiven,
    RunFinished,
)
from opt_logbook.record.stability_events import RollbackBegan

from opt_train.protocol.commands import Kill
from opt_train.protocol.facts import Heartbeat
from opt_train.protocol.interventions import INTERVENE
from opt_train.protocol.orders import LedgerEntry, ScaleLr
from opt_train.simulation.links import slots_of
from opt_train.simulation.world import World
from opt_train.supervisor.effects import Send
from opt_train.supervisor.inputs import HeartbeatReceived, InboxReceived, Tick
from tests.supervisor.started import a_run

LONG: dict[str, object] = {"memory_every_steps": 2, "every_steps": 4, "steps": 24, "memory_keep": 4}


def ask(world: World, step: int, **changes: float) -> None:
    """As `opt-train intervene` does."""
    message = {"kind": INTERVENE, "by": "ada", "why": "it climbs"}
    message["changes"] = {"roll_back": step, **changes}
    world.feed(InboxReceived(message))
    world._drain()


def attempts(world: World) -> list[tuple[str, int | None, int, str]]:
    """Name, first step, generation and checkpoint's tier of each."""
    return [
        (e.attempt, e.step, e.event.generation, e.event.checkpoint.split("/")[0])
        for e in world.entries(AttemptStarted)
    ]


def trail_of(world: World) -> list[tuple[str, int]]:
    """(attempt, step) of every step that the newest weights were trained on, oldest first."""
    steps, trail = [], world.newest_trail
    while trail is not None:
        steps.append((trail.attempt, trail.step))
        trail = trail.before
    return steps[::-1]


def test_in_place_no_process_ends_and_the_changes_hold_from_there_on() -> None:
    world = a_run(**LONG).until_step(11)
    pids = {rank.pid for rank in world.ranks()}
    ask(world, 9, lr_scale=0.5)
    world.until(OrderEnded)
    assert {rank.pid for rank in world.ranks()} == pids
    assert attempts(world) == [("1.00", 0, 1, ""), ("1.01", 8, 2, "memory")]
    [ended] = world.entries(AttemptEnded)
    assert (ended.event.outcome, ended.event.generation) == ("rolled back", 1)
    assert world.entries(OrderEnded)[0].step == 8
    half = world.replayed.ledger[0]
    assert half == LedgerEntry(8, ScaleLr(2, half.order.reason, 0.5))
    assert world.replayed.orders_given == 2
    assert world.replayed.attempt is not None
    assert world.replayed.attempt.rollback == 1
    world.run()
    assert trail_of(world) == [
        *(("1.00", step) for step in range(1, 9)),
        *(("1.01", step) for step in range(9, 25)),
    ]
    assert world.events(FailureSeen) == []
    assert world.events(RunFinished)


def test_an_agent_that_has_not_read_of_it_yet_keeps_its_rank() -> None:
    """Rank 0's word may be here before another node's agent has read its own rank's."""
    world = a_run(**LONG).until_step(11)
    agents = list(world.agents.values())
    before = {agent.node: Heartbeat(slots_of(world, agent)) for agent in agents}
    ask(world, 9)
    world.until(OrderEnded)
    for node, heartbeat in before.items():
        world.feed(HeartbeatReceived(node, heartbeat))
    # What is watched for is looked at once a second.
    world.now += 1.0
    world.feed(Tick())
    world.run()
    assert not [e for e in world.effects if isinstance(e, Send) and isinstance(e.command, Kill)]
    assert world.events(FailureSeen) == []
    assert attempts(world) == [("1.00", 0, 1, ""), ("1.01", 8, 2, "memory")]


def test_a_second_one_goes_back_to_a_snapshot_of_the_attempt_before() -> None:
    world = a_run(**LONG).until_step(11)
    ask(world, 10)
    world.until(OrderEnded).until_step(11)
    ask(world, 7)
    world.until(OrderEnded, count=2)
    assert attempts(world)[1:] == [("1.01", 10, 2, "memory"), ("1.02", 6, 3, "memory")]
    assert world.events(RollbackBegan) == []
    world.run()
    assert world.events(RunFinished)


def test_beyond_what_ranks_have_in_memory_they_are_ended_and_begin_there() -> None:
    world = a_run(**{**LONG, "memory_every_steps": 0}).until_step(11)
    ask(world, 11, lr_scale=0.5)
    world.until(AttemptStarted, count=2)
    assert attempts(world)[1][1:] == (8, 3, "checkpoints")
    assert world.events(RollbackBegan) == [RollbackBegan(1, 1)]
    assert world.events(AttemptEnded)[0].outcome == "rolled back"
    # Ranks begin with the change: the ledger in their `Begin` has it.
    world.until_step(9)
    assert {entry.step for r in world.ranks() for entry in r.begin.ledger} == {8}
    world.run()
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
    assert world.events(FailureSeen) == []
    assert trail_of(world)[7:9] == [("1.00", 8), (attempts(world)[1][0], 9)]


@pytest.mark.parametrize("first", ["the order", "the failure"])
def test_ranks_that_die_first_begin_again_where_it_is_wanted(first: str) -> None:
    """Though a newer snapshot is there: it may be what is sick."""
    world = a_run(**LONG).until_step(11)
    world.deaf = True
    if first == "the order":
        ask(world, 7)
        world.kill_rank(0)
    else:
        world.kill_rank(0)
        ask(world, 7)
    world.deaf = False
    world.until(AttemptStarted, count=2)
    assert world.entries(AttemptStarted)[1].step == 6
    world.run()
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
    assert world.events(RunFinished)


def test_ranks_that_do_not_obey_are_ended_and_it_comes_about_all_the_same() -> None:
    world = a_run(**{**LONG, "steps": 60}).until_step(11)
    world.deaf = True
    ask(world, 9)
    world.until(FailureSeen)
    assert "did not agree on order 1" in world.events(FailureSeen)[0].what
    world.deaf = False
    world.until(AttemptStarted, count=2)
    assert world.entries(AttemptStarted)[1].step == 8
    world.until(OrderEnded)
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]


def test_a_rank_that_dies_behind_it_is_of_the_new_attempt() -> None:
    world = a_run(**LONG).until_step(11)
    ask(world, 9)
    world.until(OrderEnded).until_step(9)
    world.kill_rank(1)
    world.run()
    assert [e.attempt for e in world.entries(FailureSeen)] == ["1.01"]
    assert attempts(world)[2][1:3] == (8, 3)
    assert world.events(RunFinished)


def test_only_one_at_a_time_and_only_where_there_is_something() -> None:
    world = a_run(**LONG).until_step(11)
    ask(world, 1)
    assert world.events(OrderGiven) == []
    world.deaf = True
    ask(world, 9)
    ask(world, 7)
    [given] = world.events(OrderGiven)
    assert given.parameters["step"] == 8
    world.deaf = False
    world.run()


@pytest.mark.parametrize("effects", range(24))
def test_a_supervisor_may_die_between_any_two_things_it_does(effects: int) -> None:
    """And no name is given to two attempts."""
    world = a_run(**LONG).until_step(11)
    world.lives = effects
    ask(world, 9, lr_scale=0.5)
    for _ in range(20):
        if world.core is None:
            world.start_supervisor()
        world.second()
    world.lives = None
    if world.core is None:
        world.start_supervisor()
    world.run()
    names = [entry.attempt for entry in world.entries(AttemptStarted)]
    assert len(set(names)) == len(names)
    assert world.events(RunFinished)
    if world.events(OrderGiven):
        assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
        assert [entry.order.number for entry in world.replayed.ledger] == [2]
        assert world.replayed.ledger[0].step <= 8
