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
    HoldBegan,
    HoldEnded,
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
    PlaceVacated,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SaveAbandoned,
    SupervisorStarted,
    TrainingBegan,
    ValidationMeasured,
)
from opt_logbook.record.hardware import Offence
from opt_logbook.record.node_events import (
    ActionWithheld,
    GrowthBegan,
    LemonCleared,
    LemonNoted,
    LemonPassedOver,
    NodeReturned,
    ReplacementBegan,
)
from opt_logbook.record.stability_events import (
    DataProbed,
    InstabilityClosed,
    InstabilitySeen,
    ReplayCompared,
    RollbackBegan,
)

from opt_train.protocol.orders import RollBack, SaveAndStop, make_order
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import NODE, SHARED, Checkpoint
from opt_train.run.finding import NotedFinding
from opt_train.run.hold import hold_after
from opt_train.run.incident import Incident
from opt_train.run.instability import KEPT, Instability, lr_cut_after
from opt_train.run.ledger import from_json, with_order
from opt_train.run.lemons import TEXT_CHARACTERS_MAX, is_offence
from opt_train.run.settled_saves import SettledSaves
from opt_train.run.state import (
    OBEYED,
    SUPERSEDED,
    Node,
    OrderRecord,
    RunState,
    Stage,
    next_stage,
)

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
    ledger = from_json(event.ledger)
    # Its own orders are numbered behind those that it takes from another run.
    given = max((known.order.last_number for known in ledger), default=0)
    return replace(s, created=event, created_time=entry.time, ledger=ledger, orders_given=given)


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
    known = s.nodes.get(event.node, Node("failed"))
    out = replace(
        known,
        role="failed",
        failures=known.failures + 1,
        cause=event.cause,
        failed_at=entry.time,
    )
    offences = s.offences
    if is_offence(event.cause):
        offences = (*offences, _offence(s, entry, event))
    return replace(s, nodes={**s.nodes, event.node: out}, offences=offences)


def _offence(s: RunState, entry: Entry, event: NodeFailed) -> Offence:
    """With what a finding or the diagnosis said of it, if it was this node's."""
    found = [
        f.event for f in s.findings if f.event.node == event.node and f.event.cause == event.cause
    ]
    diagnosed = [i.diagnosis for i in s.open_incidents if i.number == event.incident]
    detail = next((d.detail for d in diagnosed if d and d.node == event.node), "")
    gpu = found[-1].gpu if found else None
    return Offence(
        entry.time,
        s.created.name if s.created is not None else "",
        event.node,
        event.cause,
        (found[-1].detail if found else detail)[:TEXT_CHARACTERS_MAX],
        gpu.uuid if gpu is not None else "",
    )


def _node_returned(s: RunState, entry: Entry, event: NodeReturned) -> RunState:
    known = s.nodes.get(event.node, Node("buffer"))
    return replace(s, nodes={**s.nodes, event.node: replace(known, role="buffer")})


def _node_promoted(s: RunState, entry: Entry, event: NodePromoted) -> RunState:
    return _takes_place(s, event.node, event.replaces)


def _lemon_passed_over(s: RunState, entry: Entry, event: LemonPassedOver) -> RunState:
    return _with_role(_takes_place(s, event.by, event.node), event.node, "buffer")


def _takes_place(s: RunState, node: str, last: str) -> RunState:
    """`node` has the place that `last` had."""
    places = s.places_of(last)
    # The node stands in one place: what an earlier allocation knew of it is over.
    kept = {place: now for place, now in s.replacements.items() if now != node}
    taken = {place: node for place in places if place != node}
    replacements = {p: now for p, now in {**kept, **taken}.items() if p != node or p not in places}
    occupied = places if node in replacements else places | {node}
    return _with_role(
        replace(s, replacements=replacements, vacated=s.vacated - occupied), node, "active"
    )


def _with_role(s: RunState, node: str, role: str) -> RunState:
    if s.has_failed(node):
        return s
    known = s.nodes.get(node, Node(role))
    return replace(s, nodes={**s.nodes, node: replace(known, role=role)})


def _place_vacated(s: RunState, entry: Entry, event: PlaceVacated) -> RunState:
    vacated = s.vacated | s.places_of(event.node)
    return _with_role(replace(s, vacated=vacated), event.node, "buffer")


def _lemon_noted(s: RunState, entry: Entry, event: LemonNoted) -> RunState:
    return replace(s, lemons={**s.lemons, event.node: event})


def _lemon_cleared(s: RunState, entry: Entry, event: LemonCleared) -> RunState:
    return replace(s, lemons={n: noted for n, noted in s.lemons.items() if n != event.node})


def _finding_noted(s: RunState, entry: Entry, event: FindingNoted) -> RunState:
    return replace(s, findings=(*s.findings, NotedFinding(event, entry.attempt)))


def _action_withheld(s: RunState, entry: Entry, event: ActionWithheld) -> RunState:
    return replace(s, withheld=s.withheld | {(event.action, event.nodes)})


def _attempt_is_over(
    s: RunState, entry: Entry, event: ReplacementBegan | GrowthBegan | RollbackBegan
) -> RunState:
    return s  # it moves the stage, and that is all


def _attempt_started(s: RunState, entry: Entry, event: AttemptStarted) -> RunState:
    start = entry.step or 0
    before = s.attempt if event.rollback else None
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
        rollback=event.rollback,
        lived_as=(*(before.lived_as if before else ()), entry.attempt),
        generations=(*(before.generations if before else ()), event.generation),
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
        withheld=frozenset(),
        settled_saves=SettledSaves(),
        validations=frozenset(),
        dropped_metrics=frozenset(),
        attempts_lost=0,
    )


def _in_force(s: RunState, entry: Entry, event: InForceReported) -> RunState:
    if s.attempt is None:
        return s
    attempt = replace(s.attempt, in_force=True)
    return replace(s, attempt=attempt, fabric_settings=event.environment)


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
        settled_saves=s.settled_saves.with_path(event.path),
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
    return replace(s, settled_saves=s.settled_saves.with_path(event.path), abandoned=abandoned)


def _instability_seen(s: RunState, entry: Entry, event: InstabilitySeen) -> RunState:
    step, known = entry.step or 0, s.instability
    if known is None or known.number != event.number:
        known = Instability(event.number, event.alarm, step, acts=0, loss=event.loss)
    unstable = known.after_alarm(event, step)
    s = replace(s, lr_cut=lr_cut_after(s.lr_cut, event, step))
    return replace(s, instability=unstable, instabilities=max(s.instabilities, event.number))


def _instability_closed(s: RunState, entry: Entry, event: InstabilityClosed) -> RunState:
    if event.outcome == KEPT and s.lr_cut is not None:
        s = replace(s, lr_cut=replace(s.lr_cut, kept=True))
    return replace(s, instability=None)


def _data_probed(s: RunState, entry: Entry, event: DataProbed) -> RunState:
    s = replace(s, probed=max(s.probed, event.order), probe=None)
    if s.instability is None:
        return s
    return replace(s, instability=s.instability.after_probe(event, entry.step or 0))


def _replay_compared(s: RunState, entry: Entry, event: ReplayCompared) -> RunState:
    return replace(s, replayed=max(s.replayed, event.order))


def _order_given(s: RunState, entry: Entry, event: OrderGiven) -> RunState:
    order = make_order(event.order, event.number, event.reason, event.parameters)
    if isinstance(order, RollBack):
        s = replace(s, probe=order if order.probe else None)
    return replace(
        s,
        instability=s.instability.after_order(order) if s.instability is not None else None,
        orders=(*s.orders, OrderRecord(order, leader=s.leader)),
        orders_given=max(s.orders_given, order.last_number),
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
    # And nothing is left to be held.
    return replace(_at_rest(s, SHARED), finished=event, hold=None)


def _run_stopped(s: RunState, entry: Entry, event: RunStopped) -> RunState:
    return replace(_at_rest(s, SHARED, NODE), stopped_by=event.by, saved_step=event.saved_step)


def _run_halted(s: RunState, entry: Entry, event: RunHalted) -> RunState:
    return replace(_at_rest(s, SHARED, NODE), question=event.question)


def _hold_changed(s: RunState, entry: Entry, event: HoldBegan | HoldEnded) -> RunState:
    return replace(s, hold=hold_after(event, entry.time))


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
    PlaceVacated: _place_vacated,
    FindingNoted: _finding_noted,
    LemonNoted: _lemon_noted,
    LemonCleared: _lemon_cleared,
    LemonPassedOver: _lemon_passed_over,
    NodeReturned: _node_returned,
    ActionWithheld: _action_withheld,
    ReplacementBegan: _attempt_is_over,
    RollbackBegan: _attempt_is_over,
    GrowthBegan: _attempt_is_over,
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
    InstabilitySeen: _instability_seen,
    InstabilityClosed: _instability_closed,
    DataProbed: _data_probed,
    ReplayCompared: _replay_compared,
    OrderGiven: _order_given,
    OrderEnded: _order_ended,
    ValidationMeasured: _validation,
    MetricsDropped: _metrics_dropped,
    RunFinished: _run_finished,
    RunStopped: _run_stopped,
    RunHalted: _run_halted,
    HoldBegan: _hold_changed,
    HoldEnded: _hold_changed,
    JournalDamaged: _journal_damaged,
}
"""What each kind of line does. Kinds not listed (notes, stalls) change nothing."""
