"""Fewer nodes when no buffer node is left, more when others have come; the batch stays the same."""

from dataclasses import replace
from typing import Any

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    IncidentClosed,
    NodePromoted,
    PlaceVacated,
    RunHalted,
    RunStopped,
)
from opt_logbook.record.node_events import GrowthBegan

from opt_train.clusters.config import ClusterConfig
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE, STOPPED
from opt_train.run.state import NODES_LOST, REPLACED
from opt_train.simulation.world import World
from opt_train.supervisor.effects import RequestNodes
from opt_train.supervisor.rules.context import Context
from opt_train.supervisor.rules.world_size import fill_places
from tests.supervisor.started import a_run, code_of


def small(**changes: Any) -> World:
    """Four nodes that train, none that stands by, and no fewer than two."""
    return a_run(**{"nodes": 4, "buffer_nodes": 0, "min_nodes": 2, "steps": 30, **changes})


def sizes(world: World) -> list[tuple[str, ...]]:
    return [started.nodes for started in world.events(AttemptStarted)]


def test_without_a_buffer_node_the_run_goes_on_with_those_that_are_left() -> None:
    world = small().until_step(4)
    world.lose_node("n1")
    world.run()
    assert world.events(PlaceVacated) == [PlaceVacated("n1", 3, 1)]
    assert sizes(world) == [("n0", "n1", "n2", "n3"), ("n0", "n2", "n3")]
    assert [s.world_size for s in world.events(AttemptStarted)] == [4, 3]
    assert world.events(IncidentClosed)[0].outcome == "recovered"
    assert code_of(world) == DONE


def test_below_the_fewest_a_person_is_asked_and_told_the_key() -> None:
    world = small(min_nodes=3).until_step(4)
    world.lose_node("n1")
    world.until_step(8)
    world.lose_node("n2")
    world.run()
    (halted,) = world.events(RunHalted)
    assert "cluster.min_nodes=2" in halted.question
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_halted_run_goes_on_with_fewer_once_a_person_allows_it() -> None:
    world = small(min_nodes=4).until_step(4)
    world.lose_node("n1")
    world.run()
    assert code_of(world) == PERSON_MUST_DECIDE
    world.config = small(min_nodes=3).config
    world.start_supervisor()
    world.run()
    assert sizes(world)[-1] == ("n0", "n2", "n3")
    assert code_of(world) == DONE


def test_a_node_that_comes_fills_the_place_at_a_checkpoint() -> None:
    world = small().until_step(4)
    world.lose_node("n1")
    world.until_step(7)
    world.names = (*world.names, "n4")
    world.run()
    (grown,) = world.entries(GrowthBegan)
    assert grown.event.nodes == ("n4",)
    # No step is lost but those that ran while the checkpoint was committed.
    restarted = world.entries(AttemptStarted)[-1]
    assert 0 <= (grown.step or 0) - (restarted.step or 0) <= 2
    assert world.events(NodePromoted) == [NodePromoted("n4", "n1", 0)]
    assert sizes(world)[-1] == ("n0", "n4", "n2", "n3")
    assert [e.outcome for e in world.events(AttemptEnded)] == ["failed", REPLACED, "finished"]
    assert code_of(world) == DONE


def test_a_node_that_comes_is_used_at_once_when_the_run_restarts_anyway() -> None:
    world = small(every_steps=25).until_step(4)
    world.lose_node("n1")
    world.until(AttemptStarted, 2)
    world.names = (*world.names, "n4")
    for _ in range(5):
        world.second()
    world.kill_rank(0)
    world.run()
    assert world.events(GrowthBegan) == []
    assert sizes(world) == [
        ("n0", "n1", "n2", "n3"),
        ("n0", "n2", "n3"),
        ("n0", "n4", "n2", "n3"),
    ]


def test_a_layout_of_pairs_leaves_a_sound_node_standing_by_until_the_pair_is_whole() -> None:
    world = World(with_replicas(2))
    world.start_supervisor()
    world.until_step(4)
    world.lose_node("n1")
    world.until_step(7)
    assert sizes(world)[-1] == ("n0", "n2")
    assert world.events(PlaceVacated) == [PlaceVacated("n1", 2, 1), PlaceVacated("n3", 2, 1)]
    world.names = (*world.names, "n4")
    world.run()
    assert sizes(world)[-1] == ("n0", "n4", "n2", "n3")
    assert code_of(world) == DONE


def test_a_sound_node_without_a_place_takes_that_of_the_next_that_fails() -> None:
    world = World(with_replicas(2))
    world.start_supervisor()
    world.until_step(4)
    world.lose_node("n1")
    world.until_step(7)
    world.lose_node("n0")
    world.run()
    assert sizes(world)[-1] == ("n2", "n3")
    assert code_of(world) == DONE


@pytest.mark.parametrize("lives", range(1, 40, 3))
def test_a_supervisor_that_dies_meanwhile_stands_where_the_journal_stands(lives: int) -> None:
    world = small().until_step(4)
    world.lose_node("n1")
    world.lives = lives
    for _ in range(8):
        world.second()
    world.names = (*world.names, "n4")
    if world.core is None:
        world.start_supervisor()
    world.lives = lives
    for _ in range(30):
        world.second()
    if world.core is None and world.finish is None:
        world.start_supervisor()
    world.lives = None
    world.run()
    assert len(sizes(world)[-1]) == 4
    assert code_of(world) == DONE


def test_where_there_is_a_queue_missing_nodes_are_asked_for_without_the_failed() -> None:
    world = small(kind="slurm").until_step(4)
    assert [e for e in world.effects if isinstance(e, RequestNodes)] == []
    world.lose_node("n1")
    world.until_step(7)
    asked = [e for e in world.effects if isinstance(e, RequestNodes)]
    assert asked[-1] == RequestNodes(1, ("n1",))


def test_where_there_is_a_queue_too_few_nodes_are_given_back_for_others() -> None:
    world = small(kind="slurm", min_nodes=4).until_step(4)
    world.lose_node("n1")
    world.run()
    assert world.events(RunHalted) == []
    assert world.events(RunStopped) == [RunStopped(NODES_LOST, 3)]
    assert code_of(world) == STOPPED
    world.names = ("n0", "n2", "n3", "n5")
    world.start_supervisor()
    world.run()
    assert sizes(world)[-1] == ("n0", "n2", "n3", "n5")
    assert code_of(world) == DONE


def test_nodes_on_which_nothing_ever_trained_are_not_given_back_for_others() -> None:
    """A broken environment would else use up every node of the cluster."""
    world = small(kind="slurm", min_nodes=4)
    for name in world.names:
        world.cut_link(name, 10_000)
    world.run()
    assert world.events(AttemptStarted) == []
    assert world.events(RunStopped) == []
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_run_that_stops_asks_for_no_nodes() -> None:
    world = small(kind="slurm").until_step(4)
    world.deaf = True
    world.ask_stop()
    world.lose_node("n1")
    world.run()
    assert [effect for effect in world.effects if isinstance(effect, RequestNodes)] == []
    assert code_of(world) == STOPPED


def test_a_layout_that_fits_not_even_those_that_are_there_takes_no_node_in() -> None:
    world = small(min_nodes=1).until_step(4)
    for name in ("n1", "n2", "n3"):
        world.lose_node(name)
    world.until(AttemptStarted, 2)
    assert sizes(world)[-1] == ("n0",)
    world.names = ("n0", "n4", "n5", "n6")
    for _ in range(4):
        world.second()
    assert world.core is not None
    state, view, identity = world.core.state, world.core.view, world.core.identity
    assert len(fill_places(Context(state, view, world.config, identity))) == 3
    assert fill_places(Context(state, view, with_replicas(5), identity)) == []


def test_nine_in_ten_are_enough_unless_said_otherwise() -> None:
    assert [ClusterConfig(nodes=n).nodes_at_least for n in (1, 2, 9, 10, 11, 124)] == [
        1,
        2,
        9,
        9,
        10,
        112,
    ]


def with_replicas(replicas: int) -> RunConfig:
    config = small().config
    return replace(config, parallel=replace(config.parallel, replicate=replicas))


def test_no_node_has_two_places_in_an_allocation_of_the_same_nodes_in_another_order() -> None:
    """A job that Slurm queued again had n1 back, and n2, which had taken its place, too: both ranks
    were begun on n2, and the second one never came up."""
    world = a_run(nodes=2, buffer_nodes=2, steps=30).until_step(4)
    world.lose_node("n1")
    world.until(IncidentClosed)
    assert sizes(world)[-1] == ("n0", "n2")
    world.kill_supervisor()
    for name in world.names:
        world.lose_node(name)
    world.agents.clear()
    world.scheduler.down.clear()
    world.names = ("n1", "n2", "n3")
    world.start_supervisor()
    world.run()
    assert sizes(world)[-1] == ("n3", "n2")
    assert code_of(world) == DONE
