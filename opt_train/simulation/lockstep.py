"""How the ranks of one generation train in the simulated world: in lockstep, a second at a time."""

from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

from opt_logbook.record.run_directory import tier_of

from opt_train.checkpoint.manifest import STATE, own_file_name
from opt_train.optim.in_force import in_force
from opt_train.protocol.exits import DONE, RANK_BAD_CONFIG, RANK_UNSTABLE, STOPPED
from opt_train.protocol.facts import (
    ExitNotice,
    InForce,
    LogLine,
    OrderObeyed,
    Probed,
    SavedFile,
    SaveFailed,
    ShardsSaved,
    SnapshotStored,
    Validation,
)
from opt_train.protocol.orders import Order, RollBack, SaveAndStop
from opt_train.run.checkpoint import MEMORY, SHARED, path_of_save
from opt_train.run.ledger import with_order
from opt_train.simulation import links, machines
from opt_train.simulation.actors import (
    START_SECONDS,
    STEP_SECONDS,
    TAIL_FILE,
    RankGroup,
    SimulatedAgent,
    SimulatedRank,
    SimulatedSlot,
)
from opt_train.simulation.storage import FULL, Trail
from opt_train.supervisor.inputs import MetricsReceived

if TYPE_CHECKING:
    from opt_train.simulation.world import World

Part = tuple[SimulatedAgent, SimulatedSlot, SimulatedRank]
"""A rank that lives, and where."""


def advance(world: "World", group: RankGroup) -> None:
    """One generation, one second: it moves only together."""
    parts = _parts(world, group)
    if not parts:
        return
    _report_saves(world, group, parts)
    if not _moves_together(world, parts):
        for _, _, rank in parts:
            if not (rank.stopped or rank.stuck) and rank.phase == "step":
                rank.phase, rank.since = "waiting", world.now
        return
    if group.slow_save_until > world.now:
        for _, _, rank in parts:
            rank.since = world.now  # it reports progress
        return
    starts = parts[0][2].phase == "start"
    slowest = max(world.slow.get(agent.node, 1.0) for agent, _, _ in parts)
    if world.now - group.moved < (START_SECONDS if starts else STEP_SECONDS * slowest):
        return
    group.moved = world.now
    world.known.stepping[group.generation] = world.now
    if group.leaving is not None:
        _leave(world, group, parts)
    elif starts:
        _begin(world, group, parts)
    elif group.step < world.config.train.steps:
        _step(world, group, parts)
    if group.step >= world.config.train.steps and group.leaving is None:
        group.leaving = (DONE, "all steps are done")
        _leave(world, group, parts)


def _parts(world: "World", group: RankGroup) -> list[Part]:
    return [
        (agent, slot, slot.rank)
        for agent in world.agents.values()
        for slot in agent.slots
        if slot.rank is not None and slot.rank.begin.generation == group.generation
    ]


def _moves_together(world: "World", parts: list[Part]) -> bool:
    """Whether all ranks are there, none is held up, and the network joins them."""
    if len(parts) < parts[0][2].begin.world_size:
        return False
    if any(rank.stopped or rank.stuck for _, _, rank in parts):
        return False
    # Nodes that are cut off together are taken to reach one another: the worst for a supervisor
    # that reaches none of them.
    return len({machines.is_cut_off(world, agent.node) for agent, _, _ in parts}) == 1


def _begin(world: "World", group: RankGroup, parts: list[Part]) -> None:
    live = world.replayed.live
    restored = live.checkpoint if live is not None else ""
    if restored in world.storage.flipped:
        _refuse(world, parts, world.storage.flipped[restored])
        return
    expected = in_force(world.config, group.ledger, group.step)
    # Training overwrites what was loaded: what was verified before says nothing of the next start.
    for agent, _, rank in parts:
        agent.verified.clear()
        values = dict(expected)
        if world.wrong_value and rank.begin.rank == len(parts) - 1:
            values[world.wrong_value] = 2.0 * values[world.wrong_value] + 1.0
        world.report_of(agent, rank, InForce(values))
        rank.phase, rank.step, rank.since = "step", group.step, world.now
    if group.step == 0 and world.config.checkpoint.memory_every_steps:
        _snapshot(world, group, parts)
    begin = parts[0][2].begin
    _probe(world, group, parts, begin.probe_order, begin.probe)
    if group.step >= world.config.train.steps and tier_of(restored) != SHARED:
        _save(world, group, parts)


def _refuse(world: "World", parts: list[Part], reason: str) -> None:
    """One rank finds a bad file, and all leave: the last one knows it from the first."""
    for agent, slot, rank in parts:
        seen_by = "" if rank.begin.rank == 1 else "rank 1: "
        leaving = ExitNotice(RANK_BAD_CONFIG, -1, seen_by + reason, cause="corrupt_checkpoint")
        line = LogLine(TAIL_FILE, 3, f"leaving with code 78 at step -1: {leaving.reason}")
        world.report_of(agent, rank, leaving)
        world.end_rank(agent, slot, code=RANK_BAD_CONFIG, leaving=leaving, tail=(line,))


def _step(world: "World", group: RankGroup, parts: list[Part]) -> None:
    if _obey(world, group, parts):
        return
    if world.poison is not None and group.step >= world.poison[0]:
        world.kill_rank(0, code=1, text=world.poison[1])
        return
    samples = int(in_force(world.config, group.ledger, group.step)["samples"])
    loss = world.data.loss(group.step, samples)
    group.step += 1
    group.trail = Trail(parts[0][2].begin.attempt, group.step, group.trail, samples)
    for agent, _, rank in parts:
        rank.phase, rank.step, rank.since = "step", group.step, world.now
        if rank.begin.rank == 0:
            line = {"step": group.step, "loss": loss, "tokens": 8 * group.step}
            line |= {"samples": samples + world.data.batch, **world.durations}
            links.send_up(world, agent, MetricsReceived(agent.node, group.generation, line))
    every = world.config.checkpoint.memory_every_steps
    # A state that is not well is not kept in memory.
    if every and group.step % every == 0 and isfinite(loss):
        _snapshot(world, group, parts)
    if (
        group.step % world.config.checkpoint.every_steps == 0
        or group.step == world.config.train.steps
    ):
        _save(world, group, parts)


def _obey(world: "World", group: RankGroup, parts: list[Part]) -> bool:
    """Take the orders that wait at this boundary; whether one of them stops the ranks."""
    waiting = (order for _, _, rank in parts for order in rank.orders)
    for order in sorted(waiting, key=lambda order: order.number):
        if order.number <= group.order_obeyed:
            continue
        if isinstance(order, RollBack):
            _roll_back(world, group, parts, order)
            return True
        _report_obedience(world, group, parts, order)
        if not isinstance(order, SaveAndStop):
            group.order_obeyed = order.number
            group.ledger = with_order(group.ledger, order, group.step)
            continue
        if world.snapshot_at_stop and group.slow_save_until < 0:
            _snapshot(world, group, parts)
            group.slow_save_until = world.now + 5.0
            return True
        _save(world, group, parts)
        group.leaving = (STOPPED, order.reason)
        _leave(world, group, parts)
        return True
    return False


def _report_obedience(world: "World", group: RankGroup, parts: list[Part], order: Order) -> None:
    for agent, _, rank in parts:
        if rank.begin.rank == 0:
            world.report_of(agent, rank, OrderObeyed(order.number, group.step))


def _roll_back(world: "World", group: RankGroup, parts: list[Part], order: RollBack) -> None:
    """The ranks go back in place, and are another generation and attempt from here on."""
    group.order_obeyed = order.last_number
    if order.step not in group.snapshots:
        group.leaving = (RANK_UNSTABLE, "not all ranks have that snapshot")
        _leave(world, group, parts)
        return
    _report_obedience(world, group, parts, order)
    # The same processes: nothing is begun, restored or verified.
    del world.groups[group.generation]
    group.generation, group.step, group.trail = (
        order.generation,
        order.step,
        group.snapshots[order.step],
    )
    world.groups[group.generation] = group
    group.snapshots = {s: trail for s, trail in group.snapshots.items() if s <= order.step}
    group.ledger = with_order(group.ledger, order, order.step)
    values = in_force(world.config, group.ledger, group.step)
    for agent, slot, rank in parts:
        rank.begin = replace(rank.begin, generation=order.generation, attempt=order.attempt)
        slot.begun_up_to = max(slot.begun_up_to, order.generation)
        rank.phase, rank.step, rank.since = "step", group.step, world.now
        world.report_of(agent, rank, InForce(values))
    _probe(world, group, parts, order.number, order.probe)


def _probe(
    world: "World", group: RankGroup, parts: list[Part], order: int, places: tuple[int, ...]
) -> None:
    """Rank 0 says what the data looks like to the state that they begin with, if it is asked."""
    losses = tuple(world.data.probed(group.step, place) for place in places)
    for agent, _, rank in parts:
        if rank.begin.rank == 0 and places:
            probed = Probed(order, group.step, places, losses, world.data.odd_ranks)
            world.report_of(agent, rank, probed)


def _snapshot(world: "World", group: RankGroup, parts: list[Part]) -> None:
    if group.step not in world.snapshots_missed:
        group.snapshots[group.step] = group.trail
    for agent, _, rank in parts:
        if world.snapshots_missed.get(group.step) == rank.begin.rank:
            continue
        first = rank.begin.rank == 0
        names = [own_file_name(rank.begin.rank), *([STATE] if first else [])]
        files = tuple(SavedFile(name, 10, f"sha of {name}") for name in names)
        state = {"healthy": True} if first else None
        path = path_of_save(rank.begin.attempt, group.step, MEMORY)
        agent.held.setdefault(path, set()).update(names)
        world.storage.trails[path] = group.trail
        world.report(
            agent,
            SnapshotStored(
                group.generation, rank.begin.attempt, rank.begin.rank, group.step, files, 0.1, state
            ),
        )


def _save(world: "World", group: RankGroup, parts: list[Part]) -> None:
    """Begin a save beside the steps; where the file system is well it is done at once."""
    # The trail is the weights' own: what the journal or a path says of them is compared with it.
    world.storage.trails[path_of_save(parts[0][2].begin.attempt, group.step)] = group.trail
    group.saves.append(group.step)
    _report_saves(world, group, parts)


def _report_saves(world: "World", group: RankGroup, parts: list[Part]) -> None:
    """Each rank says what became of its part of the saves, once the file system has answered."""
    if world.storage.stalled_until > world.now:
        return
    for step in group.saves:
        for agent, _, rank in parts:
            if world.storage.fail_commits < 0:
                world.storage.fail_commits += 1
                world.report_of(agent, rank, SaveFailed(step, FULL))
                continue
            if world.storage.is_full(world.now):
                world.report_of(agent, rank, SaveFailed(step, FULL))
                continue
            files = (SavedFile(f"rank{rank.begin.rank}.safetensors", 10, "sha"),)
            folder = f"/run/{path_of_save(rank.begin.attempt, step)}"
            world.report_of(agent, rank, ShardsSaved(step, folder, files, 0.1))
    group.saves = []


def _leave(world: "World", group: RankGroup, parts: list[Part]) -> None:
    """All leave as they said, when their saves are done."""
    assert group.leaving is not None
    if group.saves:
        for _, _, rank in parts:
            if rank.phase != "checkpoint":
                rank.phase, rank.since = "checkpoint", world.now
        return
    code, reason = group.leaving
    for agent, slot, rank in parts:
        if code == DONE and rank.begin.rank == 0:
            world.report_of(agent, rank, Validation("validation", group.step, 2.0, 100))
        leaving = ExitNotice(code, group.step, reason)
        world.report_of(agent, rank, leaving)
        world.end_rank(agent, slot, code=code, leaving=leaving)
