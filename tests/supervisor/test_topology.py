"""A swap takes one place and leaves all others; of several buffer nodes the nearest comes in."""

from opt_logbook.record.events import AttemptStarted, NodePromoted

from opt_train.clusters.topology import Topology
from opt_train.protocol.exits import DONE
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from tests.supervisor.started import code_of

LEAVES = {"n0": "a", "n1": "a", "n2": "b", "n3": "a", "n4": "b"}
NETWORK = Topology({node: ("root", leaf) for node, leaf in LEAVES.items()})


def a_wired_run() -> World:
    """Three nodes train, one of them at another leaf switch; a buffer node is at each."""
    world = World(make_config(nodes=3, buffer_nodes=2, steps=40))
    world.start_supervisor(topology=NETWORK)
    return world.until_step(4)


def test_a_buffer_node_of_the_same_leaf_switch_takes_the_place() -> None:
    world = a_wired_run()
    world.lose_node("n2")
    world.until_step(12)
    assert world.events(NodePromoted) == [NodePromoted("n4", "n2", 1)]
    world.lose_node("n0")
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n3", "n1", "n4")
    assert code_of(world) == DONE


def test_where_the_network_is_not_known_the_first_takes_it() -> None:
    world = World(make_config(nodes=3, buffer_nodes=2, steps=20))
    world.start_supervisor()
    world.until_step(4).lose_node("n2")
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n1", "n3")
