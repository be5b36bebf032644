"""Rules about snapshots, the checkpoints that agents have: commit, copy to a partner, pass on to
disk, gather for a restart.

Theory of operation
===================

A checkpoint in the shared file system costs minutes at a large size, so it is taken rarely, and a
failure costs half the interval. A *snapshot* is the same state in memory: each rank copies its part
into memory of its own and gives it to the agent of its node, which outlives the rank. It costs
seconds and no file system, so it may be taken every few steps.

1. *Take.* Each agent reports the parts of its ranks (`SnapshotStored`). When all ranks' parts
   of one step are reported, the manifest is written (`commit`): from then on it is a checkpoint of
   tier ``memory``, on record as any other. An older step that is still incomplete never will be
   complete: a rank that takes a snapshot has done with the one before.
2. *Copy.* A node that dies takes its memory with it. So each node's parts go to a partner node too,
   in another failure domain if there is one (`copy_to_partners`): a rack may lose its power, and
   the snapshot is still whole.
3. *Pass on.* Every so many steps the agents also write their parts to their nodes' own disks
   (`pass_on`). When all have, that is a second checkpoint, of tier ``node``: it survives the
   agents.
4. *Drop.* Agents have what is a checkpoint on record or may become one, and nothing else (`drop`).
   Retention decides what stays on record.
5. *Gather.* Before a restart every node gets the parts that its ranks will read, from whoever has
   them, and verifies them by the manifest (`bring_together`). A part that nobody has, or that is
   not what the manifest says, rejects the snapshot, and the newest good checkpoint before it is
   taken: a snapshot may always be lost, and the shared file system has the last word.

Nobody here knows whether the bytes are good. That is found out when they are wanted, by the agent
that has them: to read everything again all the time would cost what the tier is there to save.

What is in this file costs at every input, hundreds of times a second at 124 nodes: so who is whose
partner and which rank writes which file is computed once for each set of nodes.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from opt_logbook.record.events import CheckpointRejected

from opt_train.checkpoint.manifest import STATE, own_file_name
from opt_train.protocol.commands import Drop, Fetch
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import MEMORY, NODE, Checkpoint, path_of_save
from opt_train.run.entries import checkpoint_committed
from opt_train.run.state import Stage
from opt_train.supervisor.effects import CommitSnapshot, Send
from opt_train.supervisor.rules.checkpoints import abandon
from opt_train.supervisor.rules.context import Context, Decision, Record

COPY_AGAIN_SECONDS = 60.0
FETCH_AGAIN_SECONDS = 600.0
"""Agents give up on a source that is silent long before."""

# While ranks train --------------------------------------------------------------------------------


def commit(s: Context) -> list[Decision]:
    """All parts of a snapshot are held: its manifest may be written. What is older and incomplete
    will not be more."""
    attempt = s.attempt
    decisions: list[Decision] = []
    waiting: list[tuple[str, int]] = []
    for step, parts in s.generation.snapshots():
        path = path_of_save(attempt.name, step, MEMORY)
        if path in s.state.settled_saves or path in s.view.committing:
            continue
        if len(parts) < attempt.world_size:
            waiting.append((path, step))
            continue
        for old, old_step in waiting:
            decisions += abandon(s, old, "not all ranks took it", old_step, attempt.name)
        waiting = []
        state = next((part.state for part in parts.values() if part.state is not None), {})
        files = {
            file.path: (file.bytes, file.sha256) for part in parts.values() for file in part.files
        }
        every = s.config.checkpoint.node_every_steps
        # The memory of agents ends with the run: the last snapshot goes on to the disks, whatever
        # its step. What a run begins with is made anew faster than it is read.
        is_due = every > 0 and step > 0 and step % every == 0
        # Ranks that were asked by a signal of their own stop before anybody here knows.
        is_last = s.state.stage is Stage.STOPPING or any(p.is_last for p in parts.values())
        onward = is_due or (every > 0 and is_last)
        paths = (path, *([path_of_save(attempt.name, step, NODE)] if onward else []))
        seconds = max(part.seconds for part in parts.values())
        decisions.append(CommitSnapshot(paths, attempt.name, step, files, state or {}, seconds))
    return decisions


def copy_to_partners(s: Context) -> list[Decision]:
    """Of the newest snapshot each node's part lies in another failure domain too."""
    attempt = s.attempt
    newest = next((c for c in reversed(s.state.checkpoints) if c.tier == MEMORY), None)
    if newest is None or newest.attempt != attempt.name or newest.rejected:
        return []
    decisions: list[Decision] = []
    partner_of = partners(s, attempt)
    for node, names in own_names(attempt).items():
        partner = partner_of[node]
        copied = s.view.inventory.on(partner, newest.path)
        address = s.view.inventory.address(node)
        if (
            partner == node
            or copied.issuperset(names)
            or not address
            or not s.view.node(partner).connected
        ):
            continue
        command = Fetch(newest.path, newest.manifest_sha256, names, dict.fromkeys(names, address))
        if not s.view.was_sent(Send(partner, command), within=COPY_AGAIN_SECONDS):
            decisions.append(Send(partner, command))
    return decisions


def pass_on(s: Context) -> list[Decision]:
    """From memory to each node's own disk; when all nodes have it there, it is a checkpoint of that
    tier."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for path, made in s.view.inventory.passed_on.items():
        if path in s.state.settled_saves or made.attempt != attempt.name:
            continue
        names_of = own_names(attempt)
        answers = {
            node: s.view.inventory.answer(node, path, names) for node, names in names_of.items()
        }
        failed = [
            f"{node}: {answer.why}"
            for node, answer in answers.items()
            if answer is not None and answer.why
        ]
        if failed:
            decisions += abandon(s, path, failed[0], made.step, attempt.name)
            continue
        if all(answer is not None for answer in answers.values()):
            decisions.append(Record(checkpoint_committed(path, made, made.seconds), made.step))
            continue
        for node, answer in answers.items():
            command = Fetch(path, made.manifest_sha256, names_of[node], {}, origin=made.path)
            sent = s.view.was_sent(Send(node, command), within=FETCH_AGAIN_SECONDS)
            if answer is None and not sent and s.view.node(node).connected:
                decisions.append(Send(node, command))
    return decisions


def drop(s: Context) -> list[Decision]:
    """Agents hold what is a checkpoint, or may become one, and nothing else.

    Of an agent that has just dialled in, the facts that say what may become one are still on their
    way.
    """
    if s.view.inventory.is_empty:
        return []
    wanted = (
        {c.path for c in s.state.checkpoints}
        | s.view.committing.keys()
        | s.view.inventory.passed_on.keys()
    )
    live = s.state.live
    if live is not None:
        wanted |= {path_of_save(live.name, step, MEMORY) for step, _ in s.generation.snapshots()}
    return [
        Send(node, Drop(path))
        for node, view in s.view.nodes.items()
        if view.connected and view.caught_up
        for path in sorted(s.view.inventory.paths_on(node) - wanted)
    ]


# Before ranks begin -------------------------------------------------------------------------------


def bring_together(s: Context, wanted: Checkpoint) -> list[Decision]:
    """Have each node hold, verified, what its ranks will read of `wanted`; where that fails it is
    passed over."""
    places = s.places()
    if not all(s.view.node(node).connected for node in places):
        return []
    names_of = names_by_node(s, wanted)
    # A part that does not verify rejects the snapshot for good: Megatron reloaded one corrupt
    # replica of its local checkpoints 44 times.
    silent = []
    for node, names in names_of.items():
        answer = s.view.inventory.answer(node, wanted.path, names)
        if answer is not None and answer.why:
            return [
                Record(
                    CheckpointRejected(wanted.path, f"{node}: {answer.why}"),
                    wanted.step,
                    wanted.attempt,
                )
            ]
        if answer is None:
            silent.append(node)
    if not silent:
        return []
    holders = _holders(s, wanted.path)
    lost = next((name for node in silent for name in names_of[node] if not holders.get(name)), None)
    if lost is not None:
        why = f"no node that is left holds {lost}"
        return [Record(CheckpointRejected(wanted.path, why), wanted.step, wanted.attempt)]
    decisions: list[Decision] = []
    for node in silent:
        command = Fetch(wanted.path, wanted.manifest_sha256, names_of[node], {})
        if not s.view.was_sent(Send(node, command), within=FETCH_AGAIN_SECONDS):
            decisions.append(
                Send(node, replace(command, sources=_sources(s, node, command.names, holders)))
            )
    return decisions


def is_together(s: Context, wanted: Checkpoint) -> bool:
    """Every node that will train has said that it holds its part of `wanted`."""
    return all(_folder(s, wanted, node, names) for node, names in names_by_node(s, wanted).items())


def folder_on(s: Context, wanted: Checkpoint, node: str) -> str:
    """Where the ranks of `node` find it; empty: not there yet."""
    return _folder(s, wanted, node, names_by_node(s, wanted)[node])


def names_by_node(s: Context, wanted: Checkpoint) -> dict[str, tuple[str, ...]]:
    """What each node that will train must hold.

    Its ranks' own parts where they are what they were; all there is where each must look for its
    own anew.
    """
    slots, places = s.config.cluster.slots_per_node, s.places()
    same = (
        wanted.world_size == len(places) * slots
        and wanted.config_sha256 == s.identity.config_sha256
    )
    if not same:
        return dict.fromkeys(places, (*_shard_names(0, wanted.world_size), STATE))
    return {node: _shard_names(place * slots, slots) for place, node in enumerate(places)}


def own_names(attempt: Attempt) -> dict[str, tuple[str, ...]]:
    """Files that the ranks of each node make."""
    slots = attempt.slots_per_node
    names = {node: _shard_names(place * slots, slots) for place, node in enumerate(attempt.nodes)}
    names[attempt.nodes[0]] += (STATE,)
    return names


def partners(s: Context, attempt: Attempt) -> Mapping[str, str]:
    """Who holds each node's copy: the next node of another failure domain, else the next; alone,
    the node itself."""
    return _partners(attempt.nodes, s.nodes, s.config.cluster.nodes_per_domain)


# Asked with every input, and the same for as long as the nodes are.
@functools.lru_cache(maxsize=8)
def _partners(nodes: tuple[str, ...], order: tuple[str, ...], size: int) -> Mapping[str, str]:
    place = {node: k for k, node in enumerate(order)}
    domains = [place[node] // size if node in place else -1 for node in nodes]
    found = {}
    for here, node in enumerate(nodes):
        # A whole domain further on, so that the copies of one domain are spread over the next.
        following = [(here + k) % len(nodes) for k in (*range(size, len(nodes)), *range(size))]
        others = [k for k in following if k != here] or [here]
        found[node] = nodes[next((k for k in others if domains[k] != domains[here]), others[0])]
    return found


@functools.lru_cache(maxsize=4096)
def _shard_names(first: int, count: int) -> tuple[str, ...]:
    return tuple(own_file_name(rank) for rank in range(first, first + count))


def _folder(s: Context, wanted: Checkpoint, node: str, names: tuple[str, ...]) -> str:
    answer = s.view.inventory.answer(node, wanted.path, names)
    return answer.folder if answer is not None and not answer.why else ""


def _holders(s: Context, path: str) -> dict[str, list[str]]:
    """Name -> connected nodes that hold the file."""
    holders = defaultdict(list)
    for node, view in s.view.nodes.items():
        for name in s.view.inventory.on(node, path) if view.connected else ():
            holders[name].append(node)
    return holders


def _sources(
    s: Context, node: str, names: tuple[str, ...], holders: dict[str, list[str]]
) -> dict[str, str]:
    """Name -> where `node` gets the file, if not from itself."""
    addresses = {
        name: [s.view.inventory.address(h) for h in holders[name] if h != node] for name in names
    }
    return {name: next(filter(None, there)) for name, there in addresses.items() if any(there)}
