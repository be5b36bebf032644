"""Rules about repeat offenders (run/lemons.py): who is one is journalled with what that rests on,
and where there is a choice another node trains.

A lemon is fit: it stands by, and trains where nobody else can. The record of other runs came with
this supervisor; what it made of that is in the journal, and all that follows goes by its line.
"""

from opt_logbook.record.hardware import Offence
from opt_logbook.record.node_events import LemonCleared, LemonNoted, LemonPassedOver

from opt_train.run import lemons
from opt_train.run.state import Stage
from opt_train.supervisor.effects import ShareOffences
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.leash import may_act, withhold

GPUS_SECONDS = 5.0
"""For a new agent to say which GPUs its node has, before offences of GPUs are taken for the
node's."""


def share(s: Context) -> list[Decision]:
    """Put what this run's nodes have done on record for other runs."""
    offences, created = s.state.offences, s.state.created
    if not is_remembering(s) or not offences or s.view.shared == offences or created is None:
        return []
    return [ShareOffences(created.name, s.state.created_time, offences)]


def is_remembering(s: Context) -> bool:
    """Whether a node's name is a machine's, and what befalls it is no plan of faults."""
    return s.config.cluster.names_machines and not s.config.faults.plan


def note(s: Context) -> list[Decision]:
    """Journal each node of the run that is a repeat offender, and each that is none any more."""
    offences = (*s.identity.offences, *s.state.offences)
    if not s.view.watching or not is_remembering(s) or not (offences or s.state.lemons):
        return []
    # What has failed in this run counts as well: a node that has returned is judged by it.
    decisions: list[Decision] = []
    for node in _concerned(s, offences):
        own = lemons.offences_of(node, _uuids(s, node), offences)
        score = lemons.score(own, s.view.now.wall, s.config.supervisor.lemon_half_life_days)
        is_lemon = score >= s.config.supervisor.lemon_score
        if is_lemon and node not in s.state.lemons:
            why = lemons.described(own, s.view.now.wall)
            decisions.append(Record(LemonNoted(node, round(score, 3), why, own)))
        elif not is_lemon and node in s.state.lemons:
            decisions.append(Record(LemonCleared(node, round(score, 3))))
    return decisions


def _concerned(s: Context, offences: tuple[Offence, ...]) -> list[str]:
    """Connected nodes that the offences may be of, or were, once it is known which GPUs they
    have."""
    nodes = {offence.node for offence in offences} | set(s.state.lemons)
    gpus = {offence.gpu for offence in offences if offence.gpu}
    return [
        node
        for node in s.nodes
        if (view := s.view.node(node)).connected
        and (node in nodes or gpus & _uuids(s, node))
        and (view.gpus or not gpus or s.view.age(view.connected_at) >= GPUS_SECONDS)
    ]


def _uuids(s: Context, node: str) -> set[str]:
    return {gpu.uuid for gpu in s.view.node(node).gpus if gpu.uuid}


def pass_over(s: Context) -> list[Decision]:
    """Before an attempt: a lemon that should train stands by, where a buffer node that is none can
    take its place."""
    if not s.state.lemons or s.state.stage is not Stage.ASSEMBLING:
        return []
    # Who has left a place of its own that is still free goes back there (`promote_buffers`).
    vacant = s.vacant_places()
    for place in s.places():
        if place not in s.state.lemons or not s.is_usable(place):
            continue
        for node in s.buffer_nodes(place):
            if node in s.state.lemons or node in vacant or not s.view.node(node).connected:
                continue
            if may_act(s):
                return [Record(LemonPassedOver(place, node))]
            sentence = f"have {node} train in the place of {place}, a repeat offender"
            return withhold(s, "pass_over", (place,), sentence)
    return []
