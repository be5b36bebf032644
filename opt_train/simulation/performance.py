"""How the world carries out what the core asks for."""

from typing import TYPE_CHECKING

from opt_train.simulation import invariants, links, machines
from opt_train.supervisor.effects import (
    AcknowledgeFact,
    Append,
    ClearUncommitted,
    CommitManifest,
    CommitSnapshot,
    Effect,
    FenceNode,
    Finish,
    InspectCheckpoint,
    RequestNodes,
    RetireCheckpoint,
    Send,
    ShareOffences,
    StartAgent,
    WriteMetrics,
)
from opt_train.supervisor.inputs import CheckpointInspected, ManifestCommitted

if TYPE_CHECKING:
    from opt_train.simulation.world import World


def perform(world: "World", effect: Effect) -> None:  # noqa: PLR0912 - one case an effect
    """Carry out one effect, as effects.py promises it."""
    match effect:
        case Append(entry):
            invariants.check_append(world, world.storage.append(entry))
        case Send(node, command):
            if node in world.agents:
                links.send_down(world, world.agents[node], command)
        case AcknowledgeFact(node, number):
            _acknowledge(world, node, number)
        case StartAgent(node):
            world.ask_for_agent(node)
        case RequestNodes(count, failed):
            machines.ask_for_more(world, count, failed)
        case FenceNode(node):
            machines.fence(world, node)
        case WriteMetrics(attempt, line):
            invariants.check_metrics(world, attempt)
            if not world.storage.is_full(world.now):
                world.storage.metrics[attempt, line["step"]] = line["loss"]
        case InspectCheckpoint(path):
            assert path in world.storage.disk, f"{path} is wanted and not on the disk"
            world.answer(CheckpointInspected(path, world.storage.disk[path], "sha"))
        case CommitManifest(path, _, attempt, step):
            why = world.storage.commit(path, world.now)
            world.answer(ManifestCommitted(path, attempt, step, why, "sha", 10, 2, 0.1))
        case CommitSnapshot():
            _commit_snapshot(world, effect)
        case ShareOffences(_, _, offences):
            world.shared_offences = offences
        case RetireCheckpoint(path):
            invariants.check_retire(world, path)
            world.storage.disk.pop(path, None)
        case ClearUncommitted(attempts, kept):
            invariants.check_clear(world, kept)
            world.storage.clear(attempts, kept)
        case Finish():
            world.end(effect)


def _commit_snapshot(world: "World", effect: CommitSnapshot) -> None:
    why = ""
    for path in effect.paths:
        why = why or world.storage.commit(path, world.now)
    # The files are the agents': of all tiers the same weights.
    for path in effect.paths:
        world.storage.trails[path] = world.storage.trails[effect.paths[0]]
    files = len(effect.files)
    world.answer(
        ManifestCommitted(
            effect.paths[0],
            effect.attempt,
            effect.step,
            why,
            "sha",
            10 * files,
            files,
            0.1,
            world_size=files - 1,
            config_sha256="c0",
        )
    )


def _acknowledge(world: "World", node: str, number: int) -> None:
    agent = world.agents.get(node)
    if agent is None or not agent.connected or not links.is_clear(world, agent):
        return  # lost or late: the fact comes again
    for known in [n for n in agent.kept if n <= number]:
        invariants.check_acknowledged(world, node, agent.kept.pop(known))
