"""How each line of the journal changes the run: `fold`, the only thing that makes a `RunState` of
another.

The stage moves by `TRANSITIONS` (state.py) and nowhere else. A handler changes what its event is
about; one that is not there changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_logbook.record.events import (
    HELD_OUT,
    AgentsAdopted,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Event,
    FailureSeen,
    FindingNoted,
    GenerationKilled,
    IncidentClosed,
    IncidentDiagnosed,
    InForceReported,
    JournalDamaged,
    LineageOpened,
    MetricsDropped,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    OrderEnded,
    OrderGiven,
    ReplacementBegan,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SaveAbandoned,
    SupervisorStarted,
    TrainingBegan,
    ValidationMeasured,
)

from opt_train.protocol.orders import SaveAndStop, make_order
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import NODE, SHARED, Checkpoint
from opt_train.run.finding import NotedFinding
from opt_train.run.incident import Incident
from opt_train.run.ledger import with_order
from opt_train.run.state import OBEYED, SUPERSEDED, Node, OrderRecord, RunState, Stage, next_stage

PATHS_REMEMBERED = 64
"""Retired and abandoned paths that a new supervisor removes again: a crash may have kept their
folders. Older ones were removed by the supervisors since."""


def fold(state: RunState, entry: Entry) -> RunState:
    """The run after `entry`. Any prefix of a journal folds; a kind this version does not know
    changes nothing."""
    handler = HANDLERS.get(type(entry.event))
    if handler is None:
        return state
    after = handler(state, entry, entry.event)
    stage = next_stage(state.stage, entry.event, lives=state.live is not None)
    return after if stage == after.stage else replace(after, stage=stage)


def _run_created(s: RunState, entry: Entry, event: RunCreated) -> RunState:
    return replace(s, created=event, created_time=entry.time)


def _lineage_opened(s: RunState, entry: Entry, event: LineageOpened) -> RunState:
    return replace(s, finished=None, lineage=event.lineage, config_sha256=event.config_sha256)


def _supervisor_started(s: RunState, entry: Entry, event: SupervisorStarted) -> RunState:
    s = replace(s, leader=max(s.leader, event.leader))
    if s.stage not in (Stage.STOPPED, Stage.HALTED):
        return s
    # A person has looked and started it again: budgets begin anew after a halt.
    if s.stage is Stage.HALTED:
        s = replace(s, restarts={}, checkpoints=s.reconsidered())
    return replace(s, orders=(), question="")


def _agents_adopted(s: RunState, entry: Entry, event: AgentsAdopted) -> RunState:
    return _of_attempt(s, event.generation, leader=s.leader)


def _node_joined(s: RunState, entry: Entry, event: NodeJoined) -> RunState:
    return (
        s
        if s.has_failed(event.node)
        else replace(s, nodes={**s.nodes, event.node: Node(event.role, event.slots)})
    )


def _node_failed(s: RunState, entry: Entry, event: NodeFailed) -> RunState:
    slots = s.nodes[event.node].slots if event.node in s.nodes else 0
    return replace(s, nodes={**s.nodes, event.node: Node("failed", slots)})


def _node_promoted(s: RunState, entry: Entry, event: NodePromoted) -> RunState:
    # The node stands in one place and is replaced by nobody, so the replacements never make a
    # circle.
    kept = {k: v for k, v in s.replacements.items() if event.node not in (k, v)}
    slots = s.nodes[event.node].slots if event.node in s.nodes else 0
    nodes = s.nodes if s.has_failed(event.node) else {**s.nodes, event.node: Node("active", slots)}
    return replace(s, replacements={**kept, event.replaces: event.node}, nodes=nodes)


def _finding_noted(s: RunState, entry: Entry, event: FindingNoted) -> RunState:
    return replace(s, findings=(*s.findings, NotedFinding(event, entry.attempt)))


def _replacement_began(s: RunState, entry: Entry, event: ReplacementBegan) -> RunState:
    return s  # it moves the stage, and that is all


def _attempt_started(s: RunState, entry: Entry, event: AttemptStarted) -> RunState:
    start = entry.step or 0
    attempt = Attempt(
        name=entry.attempt,
        generation=event.generation,
        start_step=start,
        nodes=event.nodes,
        world_size=event.world_size,
        parent=event.parent,
        checkpoint=event.checkpoint,
        manifest_sha256=event.manifest_sha256,
        lineage=s.lineage,
        started=entry.time,
        leader=s.leader,
        incident=event.incident,
    )
    restored = tuple(
        replace(i, restored_step=start) if i.restored_step < 0 else i for i in s.open_incidents
    )
    return replace(
        s,
        attempt=attempt,
        generation=max(s.generation, event.generation),
        open_incidents=restored,
        history={**s.history, entry.attempt: (event.parent, start)},
        # What had passed was answered with the attempt in which it was noted.
        findings=tuple(f for f in s.findings if f.event.permanent),
        settled_saves=frozenset(),
        validations=frozenset(),
        dropped_metrics=frozenset(),
        attempts_lost=0,
    )


def _in_force(s: RunState, entry: Entry, event: InForceReported) -> RunState:
    return s if s.attempt is None else replace(s, attempt=replace(s.attempt, in_force=True))


def _training_began(s: RunState, entry: Entry, event: TrainingBegan) -> RunState:
    first = tuple(replace(i, first_step=i.first_step or entry.time) for i in s.open_incidents)
    return replace(_of_attempt(s, event.generation, began=True), open_incidents=first)


def _attempt_ended(s: RunState, entry: Entry, event: AttemptEnded) -> RunState:
    return _of_attempt(s, event.generation, outcome=event.outcome or "failed")


def _failure_seen(s: RunState, entry: Entry, event: FailureSeen) -> RunState:
    incident = Incident(event, entry.attempt, step=entry.step or 0, opened=entry.time)
    return replace(
        s,
        incidents=max(s.incidents, event.incident),
        open_incidents=(*s.open_incidents, incident),
        last_incident=event.what,
    )


def _generation_killed(s: RunState, entry: Entry, event: GenerationKilled) -> RunState:
    return _of_attempt(s, event.generation, killed=True)


def _incident_diagnosed(s: RunState, entry: Entry, event: IncidentDiagnosed) -> RunState:
    restarts = s.restarts_after(event.cause)
    strikes, in_all = restarts.get(event.cause, 0), sum(restarts.values())
    known = tuple(
        replace(i, diagnosis=event, strikes=strikes, strikes_in_all=in_all)
        if i.number == event.incident
        else i
        for i in s.open_incidents
    )
    return replace(
        s, restarts=restarts, open_incidents=known, last_incident=f"{event.cause}: {event.detail}"
    )


def _incident_closed(s: RunState, entry: Entry, event: IncidentClosed) -> RunState:
    return replace(
        s, open_incidents=tuple(i for i in s.open_incidents if i.number != event.incident)
    )


def _checkpoint_committed(s: RunState, entry: Entry, event: CheckpointCommitted) -> RunState:
    if any(c.path == event.path for c in s.checkpoints):
        return s
    step = entry.step or 0
    made = Checkpoint(
        event.path,
        entry.attempt,
        step,
        event.manifest_sha256,
        event.healthy,
        committed=entry.time,
        world_size=event.world_size,
        config_sha256=event.config_sha256,
    )
    findings = s.findings
    if not made.is_with_agents and s.live is not None and entry.attempt == s.live.name:
        findings = tuple(replace(f, saved_since=True) for f in findings)
    # A snapshot is soon gone: a run that only ever gets from one to the next has not got anywhere.
    progress = step > s.furthest_save and not made.is_with_agents
    return replace(
        s,
        checkpoints=(*s.checkpoints, made),
        findings=findings,
        settled_saves=s.settled_saves | {event.path},
        abandoned=tuple(path for path in s.abandoned if path != event.path),
        furthest_save=step if progress else s.furthest_save,
        restarts={} if progress else s.restarts,
    )


def _checkpoint_rejected(s: RunState, entry: Entry, event: CheckpointRejected) -> RunState:
    marked = tuple(replace(c, rejected=True) if c.path == event.path else c for c in s.checkpoints)
    return replace(s, checkpoints=marked)


def _checkpoint_retired(s: RunState, entry: Entry, event: CheckpointRetired) -> RunState:
    kept = tuple(c for c in s.checkpoints if c.path != event.path)
    return replace(s, checkpoints=kept, retired=(*s.retired, event.path)[-PATHS_REMEMBERED:])


def _save_abandoned(s: RunState, entry: Entry, event: SaveAbandoned) -> RunState:
    abandoned = (*s.abandoned, event.path)[-PATHS_REMEMBERED:]
    return replace(s, settled_saves=s.settled_saves | {event.path}, abandoned=abandoned)


def _order_given(s: RunState, entry: Entry, event: OrderGiven) -> RunState:
    order = make_order(event.order, event.number, event.reason, event.parameters)
    return replace(
        s,
        orders=(*s.orders, OrderRecord(order, leader=s.leader)),
        orders_given=max(s.orders_given, event.number),
    )


def _order_ended(s: RunState, entry: Entry, event: OrderEnded) -> RunState:
    ended = next((record for record in s.orders if record.number == event.number), None)
    if ended is None:
        return s
    ledger = s.ledger
    if event.outcome == OBEYED:
        ledger = with_order(ledger, ended.order, entry.step or 0)
    # A stop that was obeyed or withdrawn is still wanted: the run is on its way down.
    stays = isinstance(ended.order, SaveAndStop) and event.outcome != SUPERSEDED
    orders = tuple(
        replace(record, outcome=event.outcome) if record is ended else record
        for record in s.orders
        if record is not ended or stays
    )
    return replace(s, orders=orders, ledger=ledger)


def _validation(s: RunState, entry: Entry, event: ValidationMeasured) -> RunState:
    newest = event if event.name == HELD_OUT else s.validation
    return replace(
        s, validation=newest, validations=s.validations | {(event.name, entry.step or 0)}
    )


def _metrics_dropped(s: RunState, entry: Entry, event: MetricsDropped) -> RunState:
    return replace(s, dropped_metrics=s.dropped_metrics | {event.rank})


def _run_finished(s: RunState, entry: Entry, event: RunFinished) -> RunState:
    # The last weights are in the run directory: nothing is to stay on nodes that others will use.
    return replace(_at_rest(s, SHARED), finished=event)


def _run_stopped(s: RunState, entry: Entry, event: RunStopped) -> RunState:
    return replace(_at_rest(s, SHARED, NODE), stopped_by=event.by, saved_step=event.saved_step)


def _run_halted(s: RunState, entry: Entry, event: RunHalted) -> RunState:
    return replace(_at_rest(s, SHARED, NODE), question=event.question)


def _at_rest(s: RunState, *tiers: str) -> RunState:
    """Agents leave, and what they hold in memory goes with them; of `tiers` checkpoints stay."""
    stay = tuple(c for c in s.checkpoints if c.tier in tiers)
    return replace(s, checkpoints=stay, open_incidents=(), orders=())


def _journal_damaged(s: RunState, entry: Entry, event: JournalDamaged) -> RunState:
    # Any lost line may have begun something under a number that fences it: what is numbered next
    # leaves all of them out. A line behind this entry tells a tail that is gone, as long as the
    # distance; one more may have been torn.
    lost = 2 + max(0, event.line - entry.seq)
    return replace(
        s,
        leader=s.leader + lost,
        generation=s.generation + lost,
        attempts_lost=s.attempts_lost + lost,
        orders_given=s.orders_given + lost,
        incidents=s.incidents + lost,
    )


def _of_attempt(s: RunState, generation: int, **changes: Any) -> RunState:
    """`s` with its attempt changed, if it is the one of `generation`."""
    if s.attempt is None or s.attempt.generation != generation:
        return s
    return replace(s, attempt=replace(s.attempt, **changes))


HANDLERS: Mapping[type[Event], Callable[[RunState, Entry, Any], RunState]] = {
    RunCreated: _run_created,
    LineageOpened: _lineage_opened,
    SupervisorStarted: _supervisor_started,
    AgentsAdopted: _agents_adopted,
    NodeJoined: _node_joined,
    NodeFailed: _node_failed,
    NodePromoted: _node_promoted,
    FindingNoted: _finding_noted,
    ReplacementBegan: _replacement_began,
    AttemptStarted: _attempt_started,
    InForceReported: _in_force,
    TrainingBegan: _training_began,
    AttemptEnded: _attempt_ended,
    FailureSeen: _failure_seen,
    GenerationKilled: _generation_killed,
    IncidentDiagnosed: _incident_diagnosed,
    IncidentClosed: _incident_closed,
    CheckpointCommitted: _checkpoint_committed,
    CheckpointRejected: _checkpoint_rejected,
    CheckpointRetired: _checkpoint_retired,
    SaveAbandoned: _save_abandoned,
    OrderGiven: _order_given,
    OrderEnded: _order_ended,
    ValidationMeasured: _validation,
    MetricsDropped: _metrics_dropped,
    RunFinished: _run_finished,
    RunStopped: _run_stopped,
    RunHalted: _run_halted,
    JournalDamaged: _journal_damaged,
}
"""What each kind of line does. Kinds not listed (notes, stalls) change nothing."""
