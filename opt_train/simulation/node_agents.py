"""What the agents of the virtual world do on a command, with checks that nothing forbidden is
asked of them."""

from typing import TYPE_CHECKING

from opt_logbook.record.run_directory import tier_of

from opt_train.checkpoint.manifest import own_file_name
from opt_train.protocol.commands import Begin, Drop, Fetch, Kill, Leave, Preflight, Relay
from opt_train.protocol.facts import (
    Fetched,
    GenerationGone,
    PreflightEnded,
    Stacks,
    Store,
)
from opt_train.protocol.framing import Message
from opt_train.run.checkpoint import NODE, SHARED
from opt_train.simulation.actors import WARM_SECONDS, RankGroup, SimulatedAgent, SimulatedRank
from opt_train.simulation.invariants import check_begin

if TYPE_CHECKING:
    from opt_train.simulation.world import World


# One case a command.
def obey(world: "World", agent: SimulatedAgent, command: Message) -> None:  # noqa: PLR0912
    """Do what a command asks, as an agent does: at once, and twice as well as once."""
    match command:
        case Begin():
            _begin(world, agent, command)
        case Kill() if agent.unkillable:
            pass
        case Kill(generation, stacks):
            agent.killed_up_to = max(agent.killed_up_to, generation)
            for slot in agent.slots:
                rank = slot.rank
                if rank is not None and rank.begun_as <= generation:
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
        case Preflight():
            _test(world, agent)
        case Leave():
            world.lose_node(agent.node, "its agent left")
        case _:
            raise AssertionError(f"no agent obeys {command}")


def _test(world: "World", agent: SimulatedAgent) -> None:
    assert not any(slot.rank for slot in agent.slots), f"{agent.node} is tested while it trains"
    world.preflights.asked.append((world.now, agent.node))
    if agent.node in world.preflights.mute:
        return
    found = world.preflights.sick.get(agent.node)
    if found is not None:
        world.publish_finding(agent.node, *found)
    else:
        world.preflights.passed.add(agent.node)
    world.report(agent, PreflightEnded(5, int(found is not None), 1.0))


def _begin(world: "World", agent: SimulatedAgent, begin: Begin) -> None:
    slot = agent.slots[begin.slot]
    if begin.generation <= max(agent.killed_up_to, slot.begun_up_to) or slot.rank is not None:
        return
    check_begin(world, begin)
    if slot.warm_at > world.now:
        return
    live = world.replayed.live
    assert live is not None
    _check_restored(world, agent, begin)
    slot.rank = SimulatedRank(
        begin, world.next_pid(), begin.generation, since=world.now, step=live.start_step
    )
    slot.begun_up_to = begin.generation
    slot.warm_at = world.now + WARM_SECONDS
    world.begun.append((begin.generation, begin.rank, agent.node))
    trail = world.storage.trails[live.checkpoint] if live.checkpoint else None
    group = world.groups.setdefault(
        begin.generation,
        RankGroup(
            begin.generation,
            live.start_step,
            world.now,
            world.now,
            begin.order_number,
            trail,
            ledger=begin.ledger,
        ),
    )
    if begin.rank == 0:
        world.report_of(agent, slot.rank, Store("host", 7000 + begin.generation))
    group.moved = world.now


def _check_restored(world: "World", agent: SimulatedAgent, begin: Begin) -> None:
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


def fetch(world: "World", agent: SimulatedAgent, command: Fetch) -> None:
    """Get and verify the files that were asked for, and report how that went."""
    why = ""
    for name in command.names:
        own = [p for p in (command.path, command.origin) if name in agent.held.get(p, ())]
        good = [p for p in own if (p, name) not in agent.spoiled]
        there = world.agents.get(command.sources.get(name, ""))
        if good or (
            there is not None
            and name in there.held.get(command.path, ())
            and not there.frozen
            and there.late_until <= world.now
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
