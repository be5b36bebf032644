"""Rules about checkpoints that agents hold: commit, copy to a partner, pass on to disk, bring together for a restart.

An agent tells what it holds of its ranks' snapshots. One counts when all of it is held at one step and its manifest is
written; whether the bytes are still good is found out when they are wanted, by the agents that hold them.
"""

from opt_logbook.events import CheckpointRejected

from opt_train.checkpoint.manifest import STATE, own_file_name
from opt_train.protocol.commands import Drop, Fetch
from opt_train.supervisor.effects import CommitSnapshot, Send
from opt_train.supervisor.policy_saves import abandon, committed
from opt_train.supervisor.policy_situation import Decision, Record, Situation
from opt_train.supervisor.records import MEMORY, NODE, Attempt, Checkpoint, path_of_save

COPY_AGAIN_SECONDS = 60.0
FETCH_AGAIN_SECONDS = 600.0
"""Agents give up on a source that is silent long before."""

# While ranks train --------------------------------------------------------------------------------------------


def commit(s: Situation) -> list[Decision]:
    """All parts of a snapshot are held: its manifest may be written. What is older and incomplete will not be more."""
    attempt = s.attempt
    decisions: list[Decision] = []
    waiting: list[tuple[str, int]] = []
    for step, held in s.seen.inventory.snapshots_of(attempt.generation):
        path = path_of_save(attempt.name, step, MEMORY)
        if path in s.state.settled_saves or path in s.seen.committing:
            continue
        if len(held) < attempt.world_size:
            waiting.append((path, step))
            continue
        for old, old_step in waiting:
            decisions += abandon(s, old, "not all ranks took it", old_step, attempt.name)
        waiting = []
        state = next((part.state for part in held.values() if part.state is not None), {})
        files = {file.path: (file.bytes, file.sha256) for part in held.values() for file in part.files}
        every = s.config.checkpoint.node_every_steps
        onward = every and (step % every == 0 or s.state.stage == "stopping")
        paths = (path, *([path_of_save(attempt.name, step, NODE)] if onward else []))
        seconds = max(part.seconds for part in held.values())
        decisions.append(CommitSnapshot(paths, attempt.name, step, files, state or {}, seconds))
    return decisions


def copy_to_partners(s: Situation) -> list[Decision]:
    """Of the newest snapshot each node's part lies in another failure domain too."""
    attempt = s.attempt
    newest = next((c for c in reversed(s.state.checkpoints) if c.tier == MEMORY), None)
    if newest is None or newest.attempt != attempt.name or newest.rejected:
        return []
    decisions: list[Decision] = []
    for node in attempt.nodes:
        partner, names = partner_of(s, attempt, node), own_names(attempt, node)
        held, address = s.seen.inventory.on(partner, newest.path), s.seen.inventory.address(node)
        if partner == node or held.issuperset(names) or not address or not s.seen.view(partner).connected:
            continue
        command = Fetch(newest.path, newest.manifest_sha256, names, dict.fromkeys(names, address))
        if not s.seen.was_sent(*s.seen.key_of(partner, command), within=COPY_AGAIN_SECONDS):
            decisions.append(Send(partner, command))
    return decisions


def pass_on(s: Situation) -> list[Decision]:
    """From memory to each node's own disk; when all nodes have it there, it is a checkpoint of that tier."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for path, made in s.seen.inventory.passed_on.items():
        if path in s.state.settled_saves or made.attempt != attempt.name:
            continue
        answers = [
            (node, s.seen.inventory.fetched.get((node, path, own_names(attempt, node)))) for node in attempt.nodes
        ]
        failed = [f"{node}: {answer.why}" for node, answer in answers if answer is not None and answer.why]
        if failed:
            decisions += abandon(s, path, failed[0], made.step, attempt.name)
            continue
        if all(answer is not None for _, answer in answers):
            decisions.append(Record(committed(path, made), made.step))
            continue
        for node, answer in answers:
            command = Fetch(path, made.manifest_sha256, own_names(attempt, node), {}, origin=made.path)
            sent = s.seen.was_sent(*s.seen.key_of(node, command), within=FETCH_AGAIN_SECONDS)
            if answer is None and not sent and s.seen.view(node).connected:
                decisions.append(Send(node, command))
    return decisions


def drop(s: Situation) -> list[Decision]:
    """Agents hold what is a checkpoint, or may become one, and nothing else."""
    wanted = {c.path for c in s.state.checkpoints} | s.seen.committing.keys() | s.seen.inventory.passed_on.keys()
    live = s.state.live
    if live is not None:
        wanted |= {path_of_save(live.name, step, MEMORY) for step, _ in s.seen.inventory.snapshots_of(live.generation)}
    return [
        Send(node, Drop(path))
        for node, view in s.seen.nodes.items()
        if view.connected
        for path in sorted(s.seen.inventory.paths_on(node) - wanted)
    ]


# Before ranks begin -------------------------------------------------------------------------------------------


def bring_together(s: Situation, wanted: Checkpoint) -> list[Decision]:
    """Have each node hold, verified, what its ranks will read of `wanted`; where that fails it is passed over."""
    places = s.places()
    if not all(s.seen.view(node).connected for node in places):
        return []
    decisions: list[Decision] = []
    for node in places:
        names = names_for(s, wanted, node)
        answer = s.seen.inventory.fetched.get((node, wanted.path, names))
        if answer is not None and answer.why:
            return [Record(CheckpointRejected(wanted.path, f"{node}: {answer.why}"), wanted.step, wanted.attempt)]
        if answer is not None:
            continue
        holders = {name: _holders(s, wanted.path, name) for name in names}
        lost = [name for name in names if not holders[name]]
        if lost:
            why = f"no node that is left holds {lost[0]}"
            return [Record(CheckpointRejected(wanted.path, why), wanted.step, wanted.attempt)]
        others = {name: [h for h in holders[name] if h != node and s.seen.inventory.address(h)] for name in names}
        sources = {name: s.seen.inventory.address(there[0]) for name, there in others.items() if there}
        command = Fetch(wanted.path, wanted.manifest_sha256, names, sources)
        if not s.seen.was_sent(*s.seen.key_of(node, command), within=FETCH_AGAIN_SECONDS):
            decisions.append(Send(node, command))
    return decisions


def is_together(s: Situation, wanted: Checkpoint) -> bool:
    """Every node that will train has said that it holds its part of `wanted`."""
    return all(folder_on(s, wanted, node) for node in s.places())


def folder_on(s: Situation, wanted: Checkpoint, node: str) -> str:
    """Where the ranks of `node` find it; empty: not there yet."""
    answer = s.seen.inventory.fetched.get((node, wanted.path, names_for(s, wanted, node)))
    return answer.folder if answer is not None and not answer.why else ""


def names_for(s: Situation, wanted: Checkpoint, node: str) -> tuple[str, ...]:
    """Its ranks' own parts where they are what they were; all there is where each must look for its own anew."""
    slots, places = s.config.cluster.slots_per_node, s.places()
    same = wanted.world_size == len(places) * slots and wanted.config_sha256 == s.identity.config_sha256
    if not same:
        return (*(own_file_name(rank) for rank in range(wanted.world_size)), STATE)
    first = places.index(node) * slots
    return tuple(own_file_name(rank) for rank in range(first, first + slots))


def own_names(attempt: Attempt, node: str) -> tuple[str, ...]:
    """Files that the ranks of `node` make."""
    first = attempt.nodes.index(node) * attempt.slots_per_node
    shards = tuple(own_file_name(rank) for rank in range(first, first + attempt.slots_per_node))
    return (*shards, STATE) if first == 0 else shards


def partner_of(s: Situation, attempt: Attempt, node: str) -> str:
    """Who holds the copy: the next node of another failure domain, else the next node; alone, the node itself."""
    order, size = s.identity.nodes, s.config.cluster.nodes_per_domain
    domain = {each: order.index(each) // size if each in order else -1 for each in attempt.nodes}
    here = attempt.nodes.index(node)
    # A whole domain further on, so that the copies of one domain are spread over the next.
    following = [
        attempt.nodes[(here + k) % len(attempt.nodes)] for k in (*range(size, len(attempt.nodes)), *range(size))
    ]
    others = [each for each in following if each != node]
    return next((each for each in others if domain[each] != domain[node]), others[0] if others else node)


def _holders(s: Situation, path: str, name: str) -> list[str]:
    return [n for n, view in s.seen.nodes.items() if view.connected and name in s.seen.inventory.on(n, path)]
