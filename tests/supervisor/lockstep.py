"""How the ranks of one generation train in the tests' small world: in lockstep, a second at a
time."""

from typing import TYPE_CHECKING

from opt_logbook.record.run_directory import tier_of

from opt_train.checkpoint.manifest import STATE, own_file_name
from opt_train.optim.in_force import in_force
from opt_train.protocol.exits import RANK_BAD_CONFIG
from opt_train.protocol.facts import (
    ExitNotice,
    InForce,
    LogLine,
    OrderObeyed,
    SavedFile,
    SaveFailed,
    ShardsSaved,
    SnapshotStored,
    Validation,
)
from opt_train.protocol.orders import SaveAndStop
from opt_train.run.checkpoint import MEMORY, SHARED, path_of_save
from opt_train.supervisor.inputs import MetricsReceived
from tests.supervisor.actors import START_SECONDS, STEP_SECONDS, TAIL_FILE, Agent, Group, Rank, Slot

if TYPE_CHECKING:
    from tests.supervisor.world import World


def advance(world: "World", group: Group) -> None:
    """One generation, one second: it moves only together."""
    parts = [(a, s, s.rank) for a in world.agents.values() for s in a.slots if s.rank is not None]
    parts = [p for p in parts if p[2].begin.generation == group.generation]
    if not parts:
        return
    size = parts[0][2].begin.world_size
    if len(parts) < size or any(rank.stopped for _, _, rank in parts):
        for _, _, rank in parts:
            if not rank.stopped and rank.phase == "step":
                rank.phase, rank.since = "waiting", world.now
        return
    if group.slow_save_until > world.now:
        for _, _, rank in parts:
            rank.since = world.now  # it reports progress
        return
    pause = START_SECONDS if parts[0][2].phase == "start" else STEP_SECONDS
    if world.now - group.moved < pause:
        return
    group.moved = world.now
    if parts[0][2].phase == "start":
        restored = world.replayed.live.checkpoint if world.replayed.live is not None else ""
        if restored in world.flipped:
            _refuse(world, parts, world.flipped[restored])
            return
        _begin_steps(world, group, parts)
        if group.step >= world.config.train.steps and tier_of(restored) != SHARED:
            _save(world, group, parts)
    elif group.step < world.config.train.steps:
        _step(world, group, parts)
    if group.step >= world.config.train.steps:
        _leave(world, group, parts, 0, "all steps are done")


def _refuse(world: "World", parts: list[tuple[Agent, Slot, Rank]], reason: str) -> None:
    """One rank finds a bad file, and all leave: the last one knows it from the first."""
    for agent, slot, rank in parts:
        seen_by = "" if rank.begin.rank == 1 else "rank 1: "
        leaving = ExitNotice(RANK_BAD_CONFIG, -1, seen_by + reason, cause="corrupt_checkpoint")
        line = LogLine(TAIL_FILE, 3, f"leaving with code 78 at step -1: {leaving.reason}")
        world.report_of(agent, rank, leaving)
        world.end_rank(agent, slot, code=RANK_BAD_CONFIG, leaving=leaving, tail=(line,))


def _begin_steps(world: "World", group: Group, parts: list[tuple[Agent, Slot, Rank]]) -> None:
    expected = in_force(world.config, parts[0][2].begin.ledger, group.step)
    for agent, _, rank in parts:
        agent.verified.clear()
        values = dict(expected)
        if world.wrong_value and rank.begin.rank == len(parts) - 1:
            values[world.wrong_value] = 2.0 * values[world.wrong_value] + 1.0
        world.report_of(agent, rank, InForce(values))
        rank.phase, rank.step, rank.since = "step", group.step, world.now


def _step(world: "World", group: Group, parts: list[tuple[Agent, Slot, Rank]]) -> None:
    input_ = (order for _, _, rank in parts for order in rank.orders)
    for order in sorted(input_, key=lambda order: order.number):
        if order.number <= group.order_obeyed:
            continue
        for agent, _, rank in parts:
            if rank.begin.rank == 0:
                world.report_of(agent, rank, OrderObeyed(order.number, group.step))
        if not isinstance(order, SaveAndStop):
            group.order_obeyed = order.number
            continue
        if world.snapshot_at_stop and group.slow_save_until < 0:
            _snapshot(world, group, parts)
            group.slow_save_until = world.now + 5.0
            return
        _save(world, group, parts)
        _leave(world, group, parts, 75, order.reason)
        return
    if world.poison is not None and group.step >= world.poison[0]:
        world.kill_rank(0, code=1, text=world.poison[1])
        return
    group.step += 1
    for agent, _, rank in parts:
        rank.phase, rank.step, rank.since = "step", group.step, world.now
        if rank.begin.rank == 0 and agent.connected and not agent.frozen:
            line = {"step": group.step, "loss": 5.0 - 0.1 * group.step, "tokens": 8 * group.step}
            line |= world.durations
            world.queue.append(MetricsReceived(agent.node, group.generation, line))
    every = world.config.checkpoint.memory_every_steps
    if every and group.step % every == 0:
        _snapshot(world, group, parts)
    if (
        group.step % world.config.checkpoint.every_steps == 0
        or group.step == world.config.train.steps
    ):
        _save(world, group, parts)


def _snapshot(world: "World", group: Group, parts: list[tuple[Agent, Slot, Rank]]) -> None:
    for agent, _, rank in parts:
        if world.snapshots_missed.get(group.step) == rank.begin.rank:
            continue
        first = rank.begin.rank == 0
        names = [own_file_name(rank.begin.rank), *([STATE] if first else [])]
        files = tuple(SavedFile(name, 10, f"sha of {name}") for name in names)
        state = {"healthy": True} if first else None
        path = path_of_save(rank.begin.attempt, group.step, MEMORY)
        agent.held.setdefault(path, set()).update(names)
        world.report(
            agent,
            SnapshotStored(
                group.generation, rank.begin.attempt, rank.begin.rank, group.step, files, 0.1, state
            ),
        )


def _save(world: "World", group: Group, parts: list[tuple[Agent, Slot, Rank]]) -> None:
    for agent, _, rank in parts:
        if world.fail_commits < 0:
            world.fail_commits += 1
            world.report_of(agent, rank, SaveFailed(group.step, "No space left on device"))
            continue
        files = (SavedFile(f"rank{rank.begin.rank}.safetensors", 10, "sha"),)
        folder = f"/run/checkpoints/{rank.begin.attempt}/step-{group.step:08d}"
        world.report_of(agent, rank, ShardsSaved(group.step, folder, files, 0.1))


def _leave(
    world: "World", group: Group, parts: list[tuple[Agent, Slot, Rank]], code: int, reason: str
) -> None:
    for agent, slot, rank in parts:
        if code == 0 and rank.begin.rank == 0:
            world.report_of(agent, rank, Validation("validation", group.step, 2.0, 100))
        leaving = ExitNotice(code, group.step, reason)
        world.report_of(agent, rank, leaving)
        world.end_rank(agent, slot, code=code, leaving=leaving)
