"""What befalls nodes: power, fences, leases, and the network that reaches them."""

from typing import TYPE_CHECKING

from opt_train.simulation.actors import SimulatedAgent
from opt_train.supervisor.inputs import AgentDisconnected

if TYPE_CHECKING:
    from opt_train.simulation.world import World

QUEUE_SECONDS = 9
"""How long a wish for more nodes waits in the queue."""
MOST_ADDED = 4
BAD_HARDWARE = ("gpu_ecc", "gpu_lost", "gpu_fault", "silent_corruption", "straggler")


def lose(world: "World", node: str, reason: str) -> None:
    """Agent and ranks die without a word."""
    agent = world.agents.pop(node, None)
    world.scheduler.down[node] = reason
    world.scheduler.cut_since.pop(node, None)
    if agent is not None and node in world.served:
        world.served.discard(node)
        world.queue.append(AgentDisconnected(node))


def cut_off(world: "World", node: str, seconds: float) -> None:
    """Nothing reaches the node for `seconds`, and nothing on it ends: both sides wait."""
    agent = world.agents.get(node)
    if agent is not None:
        agent.late_until = max(agent.late_until, world.now + seconds)
        world.scheduler.cut_since.setdefault(node, world.now)


def is_cut_off(world: "World", node: str) -> bool:
    """Whether the network does not reach the node."""
    return node in world.agents and world.agents[node].late_until > world.now


def fence(world: "World", node: str) -> None:
    """Kill what lives on the node, if the scheduler answers and reaches it."""
    # One thing at a time on a node, in order: whatever was to start there has started by now.
    world.starting = [item for item in world.starting if item[1] != node]
    if world.scheduler.is_away(world.now) or is_cut_off(world, node):
        return
    lose(world, node, "fenced")


def release(world: "World", agent: SimulatedAgent) -> None:
    """The run gives the node back: its agent leaves, or the scheduler ends it."""
    if is_cut_off(world, agent.node):
        agent.connected = False  # its lease will run out, or the scheduler reach it
        agent.released = True
    else:
        world.agents.pop(agent.node)


def watch_lease(world: "World", agent: SimulatedAgent) -> None:
    """An agent that nobody has led for too long ends its ranks and leaves."""
    if agent.released and not is_cut_off(world, agent.node):
        lose(world, agent.node, "its allocation is over")
        return
    unled = world.now - agent.led_at
    if not agent.frozen and unled > world.config.supervisor.orphan_seconds:
        lose(world, agent.node, "its agent left: nobody led it")


def heal(world: "World") -> None:
    """What is reached again is called up again; with `heals` also what was lost, however badly."""
    scheduler = world.scheduler
    for node in [n for n in scheduler.cut_since if not is_cut_off(world, n)]:
        del scheduler.cut_since[node]
    # A site's own robot boots nodes and starts their jobs' steps again, whatever we think of them.
    if world.heals and world.core is not None:
        for node in sorted(world.known.failed_nodes & set(world.names)):
            if node not in world.agents:
                world.start_agent(node)


def ask_for_more(world: "World", count: int, failed: tuple[str, ...]) -> None:
    """Nodes of the queue join the allocation some time, by names unheard of."""
    out = world.known.failed_nodes
    assert out >= set(failed), "a node is left out that has not failed"
    # What went down may come back, and is tested then; bad hardware may not.
    bad = {node for node in out - set(failed) if world.replayed.nodes[node].cause in BAD_HARDWARE}
    assert not bad, f"{bad} have failed and are asked for"
    scheduler = world.scheduler
    if scheduler.is_away(world.now):
        return
    more = min(count - scheduler.coming, MOST_ADDED - scheduler.given - scheduler.coming)
    for _ in range(more):
        scheduler.coming += 1
        world.plan(QUEUE_SECONDS, lambda world, _: _add_node(world))


def _add_node(world: "World") -> None:
    scheduler = world.scheduler
    scheduler.coming -= 1
    # What is given to a run that rests is given back at once.
    if world.finish is None:
        scheduler.given += 1
        world.names += (f"e{scheduler.given}",)
