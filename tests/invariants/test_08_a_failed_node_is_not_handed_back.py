"""Invariant 8: a node that failed does not train again in this run and does not stand by, however
well it looks, until it has passed a preflight.

A provider that hands the same bad machine back cost OPT-175B attempt after attempt.
"""

import pytest
from opt_logbook.record.events import (
    AgentsAdopted,
    AttemptStarted,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    RunFinished,
    RunHalted,
    RunStopped,
)
from opt_logbook.record.node_events import NodeReturned

from opt_train.protocol.commands import Begin, Leave, Preflight
from opt_train.simulation.actors import make_config
from opt_train.simulation.histories import History
from opt_train.simulation.world import World
from opt_train.supervisor.effects import Append, Send, StartAgent


def a_run(**changes: object) -> World:
    """In it every node that failed comes back at once: Slurm says it is up, and its agent dials in
    whenever it may."""
    world = World(make_config(**changes))
    world.heals = True
    world.start_supervisor()
    return world


def failed_in(world: World) -> set[str]:
    """The nodes that ever failed, having looked that nothing was asked of them afterwards but to be
    tested, and nothing journalled of them but that they failed, until they passed."""
    failed: set[str] = set()
    ever: set[str] = set()
    tested: set[str] = set()
    for effect in world.effects:
        match effect:
            case Append(entry):
                match entry.event:
                    case NodeFailed(node):
                        failed.add(node)
                        ever.add(node)
                        tested.discard(node)
                    case NodeReturned(node):
                        assert node in failed & tested, f"{node} is back without a preflight"
                        failed.discard(node)
                    case AttemptStarted() as started:
                        assert not failed & {*started.nodes, *started.buffer}, (
                            f"{started} places {failed}"
                        )
                    case NodeJoined(node) | NodePromoted(node):
                        assert node not in failed, f"{entry.event}"
                    case AgentsAdopted(_, nodes):
                        assert not failed & set(nodes), "ranks on a failed node are not adopted"
            case Send(node, Begin() as begin):
                assert node not in failed, f"{begin} is sent to {node}, which has failed"
            case Send(node, Preflight()):
                tested.add(node)
            case StartAgent(node) if not world.config.burn_in.return_seconds:
                assert node not in failed, f"an agent is started on {node}, which has failed"
    return ever


def left(world: World, node: str) -> int:
    """How often the node was told to leave."""
    return sum(
        isinstance(e, Send) and e.node == node and isinstance(e.command, Leave)
        for e in world.effects
    )


def test_a_failed_node_that_dials_in_again_is_sent_away() -> None:
    world = a_run(steps=30).until_step(4)
    world.lose_node("n1")
    world.run()
    assert failed_in(world) == {"n1"}
    assert left(world, "n1") > 3, "it dialled in again and again"
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n2")
    assert len(world.events(RunFinished)) == 1


def test_a_failed_node_is_no_spare_for_the_next_that_fails() -> None:
    """With the last buffer node in use, the healed node is the only one left: a person must decide,
    not the robot."""
    world = a_run(steps=60).until_step(4)
    world.lose_node("n1")
    world.until(NodePromoted)
    world.until_step(8)
    world.lose_node("n0")
    world.run()
    assert failed_in(world) == {"n0", "n1"}
    (halted,) = world.events(RunHalted)
    assert "no buffer node is left" in halted.question


def test_a_buffer_node_that_failed_takes_nobody_s_place() -> None:
    world = a_run(steps=60).until_step(4)
    world.lose_node("n2")
    world.until(NodeFailed)
    for _ in range(5):
        world.second()
    assert left(world, "n2"), "it came back"
    world.lose_node("n1")
    world.run()
    assert failed_in(world) == {"n1", "n2"}
    assert world.events(NodePromoted) == []
    assert len(world.events(RunHalted)) == 1


def test_a_new_supervisor_knows_the_failed_nodes() -> None:
    """What only the supervisor's memory held would be handed back by its death."""
    world = a_run(steps=40).until_step(4)
    world.lose_node("n1")
    world.until(NodeFailed)
    world.kill_supervisor()
    for _ in range(2):
        world.second()
    world.start_supervisor()
    world.until_step(12)
    world.kill_supervisor()
    world.second()
    world.start_supervisor()
    world.run()
    assert failed_in(world) == {"n1"}
    assert left(world, "n1")
    assert len(world.events(RunFinished)) == 1


@pytest.mark.parametrize("boundary", range(0, 60, 3))
def test_no_moment_of_a_supervisor_s_death_acquits_a_node(boundary: int) -> None:
    """Between the node's failure and the attempt without it, after every third effect."""
    world = a_run().until_step(4)
    world.lose_node("n1")
    world.lives = boundary
    for _ in range(12):
        world.second()
    if world.core is None and world.finish is None:
        world.start_supervisor()
    world.lives = None
    world.run()
    # A supervisor that dies before it has journalled the failure finds the node back and well: then
    # it did not fail.
    assert failed_in(world) == {event.node for event in world.events(NodeFailed)} <= {"n1"}
    assert len(world.events(RunFinished)) == 1


def test_a_stop_and_a_new_start_do_not_acquit_a_node() -> None:
    world = a_run(steps=40).until_step(4)
    world.lose_node("n1")
    world.until(NodePromoted)
    world.until_step(8)
    world.ask_stop()
    world.run()
    assert len(world.events(RunStopped)) == 1
    world.start_supervisor()
    world.run()
    assert failed_in(world) == {"n1"}
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n2")
    assert world.entries(AttemptStarted)[-1].step >= 8
    assert len(world.events(RunFinished)) == 1


def test_a_halt_and_a_new_start_need_another_node() -> None:
    """The person who starts it again brings a node; the failed ones, first in the allocation, are
    passed over."""
    world = a_run(buffer_nodes=0).until_step(4)
    world.lose_node("n0")
    world.run()
    assert len(world.events(RunHalted)) == 1
    world.start_supervisor()
    world.run()
    assert len(world.events(RunHalted)) == 2, "with the same nodes it asks again"
    world.names = ("n0", "n1", "n2")
    world.start_supervisor()
    world.run()
    assert failed_in(world) == {"n0"}
    assert set(world.events(AttemptStarted)[-1].nodes) == {"n1", "n2"}
    assert len(world.events(RunFinished)) == 1


def test_a_node_that_fails_while_its_ranks_begin_is_not_begun_again() -> None:
    """`Begin` is sent until it is obeyed: the repetition must end with the node."""
    world = a_run().until(AttemptStarted)
    world.lose_node("n1")
    world.run()
    assert failed_in(world) == {"n1"}
    assert len(world.events(RunFinished)) == 1


SEEDS = 60


def test_no_seed_hands_a_failed_node_back() -> None:
    """The disasters of the simulation, in a world where every failed node looks healthy at once;
    `failed_in` looks from outside at what the world asserts from inside."""
    failures = []
    for seed in range(SEEDS):
        history = History(seed)
        history.world.heals = True
        failures.append(failed_in(history.run()))
    assert sum(map(bool, failures)) > SEEDS / 4, "a run without a failed node shows nothing"
    assert sum(len(nodes) > 1 for nodes in failures) > 2
