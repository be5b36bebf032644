"""Invariant 11: silence is unknown, not dead and not fine; it acts only together with training that
does not move."""

from opt_logbook.record.events import FailureSeen, IncidentDiagnosed

from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.supervisor.inputs import ClusterObserved


def a_run() -> World:
    world = World(make_config(steps=30, orphan_seconds=60.0))
    world.start_supervisor()
    return world.until_step(4)


def test_a_lost_link_with_training_still_progressing_changes_nothing() -> None:
    for node in ("n0", "n1", "n2"):
        world = a_run()
        world.cut_link(node, 25)
        journalled = len(world.journal)
        for _ in range(12):
            world.second()
        assert all(e.event.kind.startswith("checkpoint") for e in world.journal[journalled:]), node
        world.run()
        assert world.events(FailureSeen) == [], node


def test_all_links_lost_and_found_again_changes_nothing() -> None:
    world = a_run()
    for node in world.names:
        world.cut_link(node, 20)
    world.run()
    assert world.events(FailureSeen) == []


def test_silence_of_a_node_whose_peers_wait_for_it_acts() -> None:
    """An agent and its rank that are frozen with their node: no word, and no step."""
    world = a_run()
    world.stop_rank(1)
    world.cut_link("n1", 1e9)
    world.run()
    (seen,) = world.events(FailureSeen)
    assert (seen.node, seen.sign) == ("n1", "silence")
    assert world.events(IncidentDiagnosed)[0].cause == "node_failure"
    assert world.replayed.has_failed("n1")
    assert world.replayed.stage == "finished"


def test_a_cluster_that_cannot_tell_changes_nothing() -> None:
    world = a_run()
    journalled = len(world.journal)
    world.feed(ClusterObserved(dict.fromkeys(world.names, "unknown"), {}))
    assert len(world.journal) == journalled


def test_down_of_a_node_that_still_talks_waits_for_its_silence() -> None:
    world = a_run()
    world.feed(
        ClusterObserved(
            {"n0": "down", "n1": "up", "n2": "up"}, {"n0": "a hiccup of the controller"}
        )
    )
    world.run()
    assert world.events(FailureSeen) == []
