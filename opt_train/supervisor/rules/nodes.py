"""Rules about nodes: who joins, who is out, who has to leave."""

from opt_logbook.record.events import (
    IncidentClosed,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    PlaceVacated,
    RunHalted,
)

from opt_train.diagnosis.causes import Cause
from opt_train.protocol.commands import Kill, Leave
from opt_train.run.state import Stage
from opt_train.supervisor.effects import FenceNode, Send
from opt_train.supervisor.modes import Mode, mode_of
from opt_train.supervisor.rules.context import REPEAT_SECONDS, Context, Decision, Record
from opt_train.supervisor.rules.leash import withhold
from opt_train.supervisor.rules.responses import in_mode
from opt_train.supervisor.rules.returns import is_on_trial

LEAVE_AGAIN_SECONDS = 10.0


def join(s: Context) -> list[Decision]:
    """Journal each node that dials in for the first time."""
    new = [
        node
        for node in sorted(s.view.connected_now)
        if node not in s.state.nodes and node in s.view.members
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
    if not s.view.watching or not s.view.called_down:
        return []
    places = set(s.places())
    down = [
        node
        for node in s.nodes
        if node not in places
        and s.is_usable(node)
        and s.view.is_down(node)
        and (s.state.live is None or node not in s.state.live.nodes)
    ]
    mode = mode_of(Cause.NODE_FAILURE, "", s.config.supervisor)
    if down and mode is not Mode.ACT:
        return withhold(s, "take_out", tuple(down), f"take {', '.join(down)} out", mode)
    return [Record(NodeFailed(node, incident=0, cause=s.cause_of_loss(node))) for node in down]


def fail_unreachable(s: Context) -> list[Decision]:
    """While nothing trains: a node that should and is down, or does not come in time, is out."""
    incident = s.state.incident
    patience = s.config.supervisor.join_seconds
    late = s.view.age(s.view.stage_since) > patience
    decisions: list[Decision] = []
    for node in s.places() if late or s.view.called_down else ():
        view = s.view.node(node)
        if not s.is_usable(node):
            continue
        if s.view.is_down(node) or (late and not view.connected):
            # Fenced before it is given up: whatever lives there may come back when the network
            # does.
            decisions.append(FenceNode(node))
        elif not (late and s.view.age(view.connected_at) > patience and not s.is_warm(node)):
            continue
        failed = NodeFailed(node, incident.number if incident else 0, s.cause_of_loss(node))
        decisions.append(Record(failed))
    mode = mode_of(Cause.NODE_FAILURE, "", s.config.supervisor)
    if decisions and mode is not Mode.ACT:
        return halt(s, _absence_question(decisions, mode), Cause.NODE_FAILURE)
    return decisions


def _absence_question(decisions: list[Decision], mode: Mode) -> str:
    failures = (d.event for d in decisions if isinstance(d, Record))
    out = ", ".join(event.node for event in failures if isinstance(event, NodeFailed))
    would = in_mode(f"take {out} out and put buffer nodes in the places", mode)
    return f"{out} should train, and did not come or went down; {would}. Start again without."


def promote_buffers(s: Context) -> list[Decision]:
    """A buffer node takes the place of a node that is out."""
    for place in s.out_places():
        incident = s.state.incident
        buffer_nodes = s.buffer_nodes(place)
        if not buffer_nodes:
            return []
        number, node = incident.number if incident else 0, buffer_nodes[0]
        if node in s.vacant_places():  # it stands in one place, and has one already
            return [
                Record(NodePromoted(node, replaces=node, incident=number)),
                Record(PlaceVacated(place, len(s.places()), number)),
            ]
        return [Record(NodePromoted(node, replaces=place, incident=number))]
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


def evict(s: Context) -> list[Decision]:
    """Ranks of another generation than the one in charge are killed; nodes that are out, or
    strangers, leave."""
    if not s.view.watching and s.state.stage not in (Stage.ASSEMBLING, Stage.RECOVERING):
        return []
    live, rollback = s.state.live, s.state.rollback
    # Ranks that went back in place were others before, and are shown as those until their agents
    # have read of it.
    known = set(live.generations) if live is not None else set()
    if live is not None and rollback is not None:
        # Some may have gone back already, and the word of it is on its way.
        known.add(rollback.generation)
    decisions: list[Decision] = []
    usable = s.view.members - s.state.failed_nodes
    for node, view in s.view.nodes.items():
        if not view.connected:
            continue
        is_out = node not in usable and (live is None or node not in live.nodes)
        if is_out and not is_on_trial(s, node):
            if not s.view.was_sent(Send(node, LEAVE), within=LEAVE_AGAIN_SECONDS):
                decisions.append(Send(node, LEAVE))
            continue
        # Slurm lets the tasks of a cut node run on after it has marked it DOWN: when the cable is
        # back, so are they, with an older generation.
        strange = view.running - known
        if not strange:
            continue
        kill = Kill(generation=max(strange), stacks=False)
        if not s.view.was_sent(Send(node, kill), within=REPEAT_SECONDS):
            decisions.append(Send(node, kill))
    return decisions


LEAVE = Leave(reason="the node is out of this run")
