"""The links between agents and the supervisor, in virtual time: one stream each way, in order.

Whatever is on its way arrives late, or never if the link ends first; nothing overtakes anything.
Each end notices by itself that the other is silent: the agent when no lease comes, the supervisor
when no heartbeat does. So the two may disagree for a while about whether there is a link, as over
TCP.
"""

from typing import TYPE_CHECKING

from opt_train.protocol.commands import Command
from opt_train.protocol.facts import AgentState, SlotState, SnapshotFiles
from opt_train.protocol.framing import Message
from opt_train.simulation.actors import SimulatedAgent
from opt_train.simulation.node_agents import obey
from opt_train.supervisor.inputs import AgentConnected, AgentDisconnected, FactReceived, Input

if TYPE_CHECKING:
    from opt_train.simulation.world import World

AGENT_SILENCE_SECONDS = 15.0
SERVER_SILENCE_SECONDS = 30.0


def is_clear(world: "World", agent: SimulatedAgent) -> bool:
    """Whether what is sent now arrives at once."""
    return agent.late_until <= world.now and not agent.delay and not agent.outgoing


def send_up(world: "World", agent: SimulatedAgent, input_: Input) -> None:
    """From the agent to the supervisor, if there is a link."""
    if not agent.connected or agent.frozen:
        return
    if is_clear(world, agent):
        world.queue.append(input_)
    else:
        agent.outgoing.append((world.now + agent.delay, input_))


def send_down(world: "World", agent: SimulatedAgent, command: Command) -> None:
    """From the supervisor to the agent, if there is a link."""
    if not agent.connected or agent.frozen:
        return
    if is_clear(world, agent) and not agent.incoming:
        obey(world, agent, command)
    else:
        agent.incoming.append((world.now + agent.delay, command))


def deliver(world: "World", agent: SimulatedAgent) -> None:
    """What is due on the agent's link arrives, oldest first."""
    if agent.late_until > world.now:
        return
    while agent.outgoing and agent.outgoing[0][0] <= world.now:
        world.queue.append(agent.outgoing.pop(0)[1])
    while agent.incoming and agent.incoming[0][0] <= world.now and not agent.frozen:
        obey(world, agent, agent.incoming.pop(0)[1])


def watch(world: "World", agent: SimulatedAgent) -> None:
    """One second of an agent's lease and of both ends of its link."""
    now, reached = world.now, agent.late_until <= world.now
    if agent.connected and reached:
        agent.led_at = now - agent.delay
        if not agent.frozen:
            agent.served_at = now - agent.delay
    elif agent.connected and now - agent.led_at > AGENT_SILENCE_SECONDS and not agent.frozen:
        _close(agent)
    if agent.node in world.served and now - agent.served_at > SERVER_SILENCE_SECONDS:
        world.served.discard(agent.node)
        _close(agent)
        world.queue.append(AgentDisconnected(agent.node))
    # What is given back and still runs ends as soon as it is reached: it dials nobody.
    ends = agent.frozen or agent.released
    free = not agent.connected and not ends and agent.link_until <= now and reached
    if free and world.core is not None and not world.refuses_links:
        connect(world, agent)


def connect(world: "World", agent: SimulatedAgent) -> None:
    """Dial in: the whole state, then what was not acknowledged."""
    assert world.core is not None
    agent.connected, agent.led_at, agent.served_at = True, world.now, world.now
    world.served.add(agent.node)
    agent.first_leader = agent.first_leader or world.core.identity.leader
    # Whole, not a difference: the supervisor at the other end may be a new one.
    held = tuple(SnapshotFiles(path, tuple(sorted(names))) for path, names in agent.held.items())
    state = AgentState(
        agent.node,
        agent.pid,
        slots_of(world, agent),
        held=held,
        address=agent.node,
        first_leader=agent.first_leader,
    )
    send_up(world, agent, AgentConnected(agent.node, state))
    for number, fact in agent.kept.items():
        send_up(world, agent, FactReceived(agent.node, number, fact))


def cut(world: "World", agent: SimulatedAgent, seconds: float) -> None:
    """Both ends see the link end now, and no other is made for `seconds`."""
    # Each end has its own kernel's word for it, so both know at once.
    agent.link_until = world.now + seconds
    if agent.connected:
        world.served.discard(agent.node)
        _close(agent)
        world.queue.append(AgentDisconnected(agent.node))


def report(world: "World", agent: SimulatedAgent, fact: Message) -> None:
    """Number a fact, keep it, and send it if there is a link."""
    # Kept until acknowledged, also while there is no link: that is what lets a supervisor die.
    agent.number += 1
    agent.kept[agent.number] = fact
    send_up(world, agent, FactReceived(agent.node, agent.number, fact))


def slots_of(world: "World", agent: SimulatedAgent) -> tuple[SlotState, ...]:
    """The agent's slots as a heartbeat shows them."""
    slots = []
    for number, slot in enumerate(agent.slots):
        warm = slot.warm_at <= world.now
        rank = slot.rank
        if rank is None:
            slots.append(SlotState(number, "warm" if warm else "warming", spare=warm))
            continue
        slots.append(
            SlotState(
                number,
                "running",
                warm,
                rank.pid,
                rank.begin.generation,
                rank.begin.attempt,
                rank.begin.rank,
                rank.phase,
                rank.step,
                world.now - rank.since,
                "T" if rank.stopped else "S",
            )
        )
    return tuple(slots)


def _close(agent: SimulatedAgent) -> None:
    # What was on its way is lost with the connection: facts are kept, commands are decided again.
    agent.connected, agent.outgoing, agent.incoming = False, [], []
