"""Rules about nodes: who joins, who is out, who has to leave."""

from opt_logbook.record.events import (
    IncidentClosed,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    RunHalted,
)

from opt_train.protocol.commands import Kill, Leave
from opt_train.run.state import Stage
from opt_train.supervisor.effects import FenceNode, Send
from opt_train.supervisor.rules.context import REPEAT_SECONDS, Context, Decision, Record

LEAVE_AGAIN_SECONDS = 10.0


def join(s: Context) -> list[Decision]:
    """Journal each node that dials in for the first time."""
    new = [
        node
        for node in sorted(s.view.connected_now)
        if node not in s.state.nodes and node in s.identity.nodes
    ]
    places = s.places() if new else ()
    return [
        Record(
            NodeJoined(
                node, "active" if node in places else "buffer", s.config.cluster.slots_per_node
            )
        )
        for node in new
    ]


def lose_buffers(s: Context) -> list[Decision]:
    """A node that stands by and goes down is out, without an incident: nothing was lost."""
    if not s.view.watching:
        return []
    places = s.places()
    return [
        Record(NodeFailed(node, incident=0, cause="node_failure"))
        for node in s.identity.nodes
        if node not in places
        and s.is_usable(node)
        and s.view.is_down(node)
        and (s.state.live is None or node not in s.state.live.nodes)
    ]


def fail_unreachable(s: Context) -> list[Decision]:
    """While nothing trains: a node that should and is down, or does not come in time, is out."""
    incident = s.state.incident
    patience = s.config.supervisor.join_seconds
    decisions: list[Decision] = []
    for node in s.places():
        view = s.view.node(node)
        if not s.is_usable(node):
            continue
        late = s.view.age(s.view.stage_since) > patience
        if s.view.is_down(node) or (late and not view.connected):
            # Fenced before it is given up: whatever lives there may come back when the network
            # does.
            decisions.append(FenceNode(node))
        elif not (late and s.view.age(view.connected_at) > patience and not is_warm(s, node)):
            continue
        decisions.append(
            Record(NodeFailed(node, incident.number if incident else 0, "node_failure"))
        )
    return decisions


def promote_buffers(s: Context) -> list[Decision]:
    """A buffer node takes the place of a node that is out; without one a person must decide."""
    for place in s.places():
        if s.is_usable(place):
            continue
        incident = s.state.incident
        buffer_nodes = s.buffer_nodes()
        if buffer_nodes:
            return [
                Record(
                    NodePromoted(
                        buffer_nodes[0], replaces=place, incident=incident.number if incident else 0
                    )
                )
            ]
        # OPT-175B lost five hosts at once with a buffer of four, and went on with eighteen.
        more = s.config.cluster.buffer_nodes + 1
        question = (
            f"{place} is out and no buffer node is left to take its place; "
            f"start again with cluster.buffer_nodes={more}, or on healthy nodes."
        )
        return halt(s, question, incident.cause if incident and incident.cause else "node_failure")
    return []


def halt(s: Context, question: str, cause: str) -> list[Decision]:
    """Close what is open and stop for a person."""
    return [*close_incidents(s, "halted"), Record(RunHalted(question, cause))]


def close_incidents(s: Context, outcome: str) -> list[Decision]:
    """Every open incident ends with the run."""
    decisions: list[Decision] = []
    for incident in s.state.open_incidents:
        seconds = max(0.0, s.view.now.wall - incident.opened)
        lost = max(0, incident.step - incident.restored_step) if incident.restored_step >= 0 else 0
        down = max(0.0, incident.first_step - incident.opened) if incident.first_step else seconds
        closed = IncidentClosed(incident.number, outcome, lost, round(seconds, 3), round(down, 3))
        decisions.append(Record(closed, step=incident.step))
    return decisions


def is_warm(s: Context, node: str) -> bool:
    """Every slot of the node has a warm rank, and nothing runs there."""
    # Without a warm rank in every slot one import of torch (7 to 10 s on a busy core) would hold up
    # all other ranks; from a warm one the first step takes 0.2 to 0.9 s (measured).
    slots = s.view.node(node).slots
    wanted = range(s.config.cluster.slots_per_node)
    return all(
        k in slots and slots[k].stage != "running" and (slots[k].spare or slots[k].stage == "warm")
        for k in wanted
    )


def evict(s: Context) -> list[Decision]:
    """Ranks of another generation than the one in charge are killed; nodes that are out, or
    strangers, leave."""
    if not s.view.watching and s.state.stage not in (Stage.ASSEMBLING, Stage.RECOVERING):
        return []
    live = s.state.live
    decisions: list[Decision] = []
    for node, view in s.view.nodes.items():
        if not view.connected:
            continue
        if not s.is_usable(node) and (live is None or node not in live.nodes):
            if not s.view.was_sent(Send(node, LEAVE), within=LEAVE_AGAIN_SECONDS):
                decisions.append(Send(node, LEAVE))
            continue
        # Slurm lets the tasks of a cut node run on after it has marked it DOWN: when the cable is
        # back, so are they, with an older generation.
        strange = [
            slot.generation
            for slot in view.slots.values()
            if slot.stage == "running" and (live is None or slot.generation != live.generation)
        ]
        if not strange:
            continue
        kill = Kill(generation=max(strange), stacks=False)
        if not s.view.was_sent(Send(node, kill), within=REPEAT_SECONDS):
            decisions.append(Send(node, kill))
    return decisions


LEAVE = Leave(reason="the node is out of this run")
