"""What the agents of the virtual world do on a command, with checks that nothing forbidden is
asked of them."""

from typing import TYPE_CHECKING

from opt_logbook.record.run_directory import tier_of

from opt_train.checkpoint.manifest import own_file_name
from opt_train.protocol.commands import Begin, Drop, Fetch, Kill, Leave, Relay
from opt_train.protocol.facts import (
    Fetched,
    GenerationGone,
    Stacks,
    Store,
)
from opt_train.protocol.framing import Message
from opt_train.run.checkpoint import NODE, SHARED
from opt_train.supervisor.inputs import (
    AgentDisconnected,
)
from tests.supervisor.actors import WARM_SECONDS, Agent, Group, Rank

if TYPE_CHECKING:
    from tests.supervisor.world import World


# One case a command.
def obey(world: "World", agent: Agent, command: Message) -> None:  # noqa: PLR0912
    match command:
        case Begin():
            _begin(world, agent, command)
        case Kill() if agent.unkillable:
            pass
        case Kill(generation, stacks):
            agent.killed_up_to = max(agent.killed_up_to, generation)
            for slot in agent.slots:
                rank = slot.rank
                if rank is not None and rank.begin.generation <= generation:
                    if stacks:
                        state = "T" if rank.stopped else "S"
                        fact = Stacks(
                            rank.begin.generation, rank.begin.rank, not rank.stopped, state
                        )
                        world.report(agent, fact)
                    world.end_rank(agent, slot, signal=9, by_agent=True)
            world.report(agent, GenerationGone(generation))
        case Relay() if world.deaf:
            pass
        case Relay(generation, order):
            for slot in agent.slots:
                if slot.rank and slot.rank.begin.generation == generation:
                    slot.rank.orders.append(order)
        case Fetch():
            agent.fetching.append((world.now + 1.0, command))
        case Drop(path):
            agent.held.pop(path, None)
            world.node_disks.get(agent.node, {}).pop(path, None)
        case Leave():
            for slot in agent.slots:
                slot.rank = None
            world.agents.pop(agent.node, None)
            world.down[agent.node] = "its agent left"
            world.queue.append(AgentDisconnected(agent.node))
        case _:
            raise AssertionError(f"no agent obeys {command}")


def _begin(world: "World", agent: Agent, begin: Begin) -> None:
    slot = agent.slots[begin.slot]
    if begin.generation <= agent.killed_up_to or slot.rank is not None:
        return
    assert agent.node not in world.failed_nodes, f"{agent.node} has failed and is handed back"
    assert world.replayed.live is not None, "what begins is journalled"
    assert world.replayed.live.generation == begin.generation
    others = [r.begin.generation for r in world.ranks() if r.begin.generation != begin.generation]
    assert not others, f"generation {begin.generation} begins while ranks of {others} live"
    if slot.warm_at > world.now:
        return
    _check_restored(world, agent, begin)
    slot.rank = Rank(begin, world.next_pid(), since=world.now, step=world.replayed.live.start_step)
    slot.warm_at = world.now + WARM_SECONDS
    world.begun.append((begin.generation, begin.rank, agent.node))
    group = world.groups.setdefault(
        begin.generation,
        Group(
            begin.generation,
            world.replayed.live.start_step,
            world.now,
            world.now,
            begin.order_number,
        ),
    )
    if begin.rank == 0:
        world.report_of(agent, slot.rank, Store("host", 7000 + begin.generation))
    group.moved = world.now


def _check_restored(world: "World", agent: Agent, begin: Begin) -> None:
    """What a rank of a snapshot reads is there, all of it, and good."""
    assert world.replayed.live is not None
    path = world.replayed.live.checkpoint
    if begin.checkpoint is None or tier_of(path) == SHARED:
        return
    assert begin.checkpoint == f"/held/{agent.node}/{path}"
    made = next(c for c in world.replayed.checkpoints if c.path == path)
    same = made.world_size == begin.world_size
    names = {own_file_name(rank) for rank in ([begin.rank] if same else range(made.world_size))}
    assert names <= agent.held.get(path, set()), f"rank {begin.rank} lacks its part of {path}"
    assert {(path, name) for name in names} <= agent.verified, (
        f"rank {begin.rank} reads what nobody has verified"
    )


def fetch(world: "World", agent: Agent, command: Fetch) -> None:
    why = ""
    for name in command.names:
        own = [p for p in (command.path, command.origin) if name in agent.held.get(p, ())]
        good = [p for p in own if (p, name) not in agent.spoiled]
        there = world.agents.get(command.sources.get(name, ""))
        if good or (
            there is not None
            and name in there.held.get(command.path, ())
            and not there.frozen
            and (command.path, name) not in there.spoiled
        ):
            agent.held.setdefault(command.path, set()).add(name)
            if tier_of(command.path) == NODE:
                world.node_disks.setdefault(agent.node, {}).setdefault(command.path, set()).add(
                    name
                )
            agent.spoiled.discard((command.path, name))
            agent.verified.add((command.path, name))
        else:
            why = f"{name} is nowhere"
    folder = "" if why else f"/held/{agent.node}/{command.path}"
    world.report(agent, Fetched(command.path, command.names, why, folder))
