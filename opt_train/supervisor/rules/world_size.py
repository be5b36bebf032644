"""Rules of how many nodes train: fewer when no buffer node is left, more when others have come.

The global batch and the samples in it stay the same, whatever the number: ranks take unequal shares
of it, and the newest checkpoint is read by as many ranks as there are. Each place of a node that is
out and has no successor is vacant, on record (`place_vacated`), until `node_promoted` fills it.

A restart fills what can be filled. While training goes on, a checkpoint that was committed since
the others have come is the moment to grow: the attempt ends there as one that is replaced, and
loses next to nothing.
"""

from opt_logbook.record.events import (
    NodePromoted,
    PlaceVacated,
    RunStopped,
)
from opt_logbook.record.node_events import GrowthBegan

from opt_train.config.checks import fits_on
from opt_train.run.state import NODES_LOST, TERMINAL, Stage
from opt_train.supervisor.effects import RequestNodes, StartAgent
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.leash import may_act, withhold
from opt_train.supervisor.rules.node_fitness import is_unfit
from opt_train.supervisor.rules.nodes import close_incidents, halt
from opt_train.supervisor.rules.returns import may_be_asked_for

REQUEST_AGAIN_SECONDS = 60.0
AT_ITS_END = TERMINAL | {Stage.STOPPING, Stage.FINISHING}
"""Stages from which nothing leads to another attempt."""


def start_arrived(s: Context) -> list[Decision]:
    """An agent on each node that the cluster has handed out since this supervisor began."""
    return [
        StartAgent(node)
        for node in s.view.arrived
        if node not in s.view.agents_asked_for and not s.state.has_failed(node)
    ]


def request_missing(s: Context) -> list[Decision]:
    """Ask for as many nodes as are missing to train and to stand by."""
    if not s.config.cluster.has_queue or not s.view.watching:
        return []
    if s.state.stop_wanted is not None or s.state.stage in AT_ITS_END:
        return []
    if s.state.hold is not None:
        return []
    # A node that is down and not yet given up would be asked for again.
    fit = sum(not is_unfit(s.state, node) for node in s.nodes)
    missing = s.config.cluster.nodes + s.config.cluster.buffer_nodes - fit
    # Slurm takes a node that went down out of the allocation: only asked for can it come back.
    out = (node for node in s.state.nodes if s.state.has_failed(node))
    failed = tuple(node for node in out if not may_be_asked_for(s, node))
    request = RequestNodes(missing, failed)
    asked = s.view.requested == request and s.view.age(s.view.requested_at) < REQUEST_AGAIN_SECONDS
    if missing > 0 and not may_act(s):
        return withhold(s, "request_nodes", (), f"ask for {missing} more nodes")
    return [request] if missing > 0 and not asked else []


# Fewer --------------------------------------------------------------------------------------------


def go_on_with_fewer(s: Context) -> list[Decision]:
    """A node is out and no buffer node is left: its place is vacated, if the run can go on without;
    else the run gives its nodes back and waits for others, or a person must decide."""
    places = s.places()
    out = s.out_places()
    if not out or s.buffer_nodes():
        return []
    incident = s.state.incident
    number = incident.number if incident else 0
    left = [place for place in places if place not in out]
    count = largest_fitting(s, len(left))
    if count >= s.config.cluster.nodes_at_least:
        # What does not fit into the layout stands by.
        vacated = [*out, *left[count:]]
        return [Record(PlaceVacated(node, count, number)) for node in vacated]
    cause = incident.cause if incident and incident.cause else "node_failure"
    if s.config.cluster.has_queue and _has_trained(s):
        stopped = RunStopped(NODES_LOST, s.state.saved_for_later)
        return [*close_incidents(s, "stopped"), Record(stopped)]
    return halt(s, _question(s, out[0], len(left), count), cause)


def _has_trained(s: Context) -> bool:
    """Whether this supervisor's nodes have trained. Where none does, as of a broken environment,
    others would not either: one allocation after another would be used up (invariant 9)."""
    attempt = s.state.attempt
    return attempt is not None and attempt.began and attempt.leader == s.state.leader


def _question(s: Context, node: str, left: int, count: int) -> str:
    # OPT-175B lost five hosts at once with a buffer of four, and went on with eighteen.
    cluster = s.config.cluster
    question = (
        f"{node} is out and no buffer node is left to take its place; "
        f"start again with cluster.buffer_nodes={cluster.buffer_nodes + 1}, or on healthy nodes"
    )
    if 0 < count < cluster.nodes_at_least:
        question += f", or go on with {count} of {cluster.nodes} nodes by cluster.min_nodes={count}"
    elif left and not count:
        question += f"; parallel.* does not fit {left} of {cluster.nodes} nodes"
    return f"{question}."


def largest_fitting(s: Context, nodes: int) -> int:
    """The largest number up to `nodes` that the configuration can train on; 0: none."""
    return next((n for n in range(nodes, 0, -1) if fits_on(s.config, n)), 0)


# More ---------------------------------------------------------------------------------------------


def fill_places(s: Context) -> list[Decision]:
    """Before an attempt: nodes that stand ready fill vacant places, as many as the layout takes."""
    incident = s.state.incident
    filling = _filling(s, _candidates(s))
    return [
        Record(NodePromoted(node, replaces=place, incident=incident.number if incident else 0))
        for node, place in filling
    ]


def begin_growth(s: Context) -> list[Decision]:
    """While training: a checkpoint has been committed since nodes for vacant places have come, and
    the ranks are ended to begin again with them."""
    attempt = s.attempt
    if not attempt.began or s.generation.exits or s.step >= s.config.train.steps:
        return []  # ranks that are at their end anyway are let go
    filling = _filling(s, s.ready_buffers()) if s.view.watching or s.view.committed else []
    if not filling:
        return []
    nodes = tuple(node for node, _ in filling)
    since = max(s.view.node(node).connected_at for node in nodes)
    saved = [c for c in s.state.chain() if c.attempt == attempt.name and not c.is_with_agents]
    if not saved or saved[-1].committed < s.view.now.wall - s.view.age(since):
        return []
    if not may_act(s):
        return withhold(s, "grow", nodes, f"end the ranks to go on with {', '.join(nodes)} too")
    return [Record(GrowthBegan(attempt.generation, nodes), step=s.step)]


def _candidates(s: Context) -> list[str]:
    """Nodes that may fill a vacant place. A supervisor that has begun nothing yet has just received
    its nodes, and waits for them as for those that have a place."""
    if s.state.attempt is None or s.state.attempt.leader != s.state.leader:
        return s.buffer_nodes()
    return s.ready_buffers()


def _filling(s: Context, candidates: list[str]) -> list[tuple[str, str]]:
    """(Node, the place it fills) for as many of `candidates` as a fitting number of nodes takes."""
    vacant = s.vacant_places()
    if not vacant or not candidates:
        return []
    # One that left its place though it is sound goes back to it.
    own = [(node, node) for node in candidates if node in vacant]
    others = [node for node in candidates if node not in vacant]
    free = [place for place in vacant if place not in candidates]
    pairs = [*own, *_nearest_first(s, others, free)]
    now = len(s.places())
    # A layout that a person has changed may not even fit those that are there.
    return pairs[: max(0, largest_fitting(s, now + len(pairs)) - now)]


def _nearest_first(s: Context, nodes: list[str], places: list[str]) -> list[tuple[str, str]]:
    """Pairs of a node and a place: each place in its turn has the nearest of the nodes left."""
    # Greedy: a better matching is worth nothing where a few buffer nodes stand at few switches.
    left, pairs = list(nodes), []
    for place in places[: len(nodes)]:
        node = min(left, key=lambda n: s.preference(n, place))
        left.remove(node)
        pairs.append((node, place))
    return pairs
