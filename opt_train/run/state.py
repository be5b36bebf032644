"""What a run is, as its journal tells it: `RunState` and `fold`, the only thing that changes it.

A supervisor that starts folds the journal and stands where the one before stood. What the journal
does not say (connections, pulses, metrics) is an `ClusterView` and is told anew by the agents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opt_logbook.record.attempt import AttemptId
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
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SaveAbandoned,
    SupervisorStarted,
    TrainingBegan,
    ValidationMeasured,
)

from opt_train.run.records import (
    FASTEST_LAST,
    NODE,
    SHARED,
    Attempt,
    Checkpoint,
    Incident,
    Node,
    OrderRecord,
)

TERMINAL = frozenset({"finished", "stopped", "halted"})
"""Stages in which nothing more happens until somebody starts the run again."""

SAVE_AND_STOP = "save_and_stop"
SUPERSEDED = "superseded"
"""The outcome of a stop that somebody has countermanded by starting the run again."""


@dataclass(frozen=True, slots=True)
class RunState:
    """The whole run. `RunState()` is the run that has not begun.

    `stage`: ``new``, ``assembling`` (waiting for nodes), ``starting`` (ranks begin), ``training``,
    ``stopping`` (a stop was asked and ranks may live), ``failing`` (ranks are killed, words
    collected), ``recovering`` (as assembling, after an incident), ``finishing`` (all ranks are
    done), ``finished``, ``stopped``, ``halted``.
    """

    stage: str = "new"
    created: RunCreated | None = None
    created_time: float = 0.0
    lineage: int = 0
    config_sha256: str = ""
    leader: int = 0
    """The highest fencing number of a supervisor."""
    attempts_lost: int = 0
    """Attempts that may have begun on journal lines that cannot be read any more: their names are
    not used again."""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    replacements: Mapping[str, str] = field(default_factory=dict)
    """Node -> the buffer node that took its place."""
    generation: int = 0
    attempt: Attempt | None = None
    history: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Attempt -> (parent, start step): the tree that the live chain is a path of."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """In the order they were committed."""
    settled_saves: frozenset[str] = frozenset()
    """Paths of the current attempt's saves that were committed or abandoned: facts about them are
    old news."""
    retired: tuple[str, ...] = ()
    """The last few retired paths: a crash may have kept their folders."""
    abandoned: tuple[str, ...] = ()
    """The last few abandoned paths, likewise."""
    furthest_save: int = -1
    """The largest step ever committed: passing it is progress."""
    open_incidents: tuple[Incident, ...] = ()
    """Oldest first. Several stay open when a run fails again before it is where it was."""
    incidents: int = 0
    last_incident: str = ""
    """For the status line: what was seen, then what was behind it."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Cause -> incidents since the last progress."""
    orders: int = 0
    """Orders ever given."""
    order: OrderRecord | None = None
    """The newest order, until the run has come to rest."""
    validations: frozenset[tuple[str, int]] = frozenset()
    """(name, step) of validations journalled in the current attempt."""
    validation: ValidationMeasured | None = None
    """The newest of the held-out part of the corpus; named sets are in the journal alone."""
    dropped_metrics: frozenset[int] = frozenset()
    """Ranks of the current attempt whose dropped metrics are journalled."""
    stopped_by: str = ""
    question: str = ""
    saved_step: int = -1
    finished: RunFinished | None = None

    @property
    def live(self) -> Attempt | None:
        """The attempt that may have living ranks."""
        return self.attempt if self.attempt is not None and not self.attempt.outcome else None

    @property
    def incident(self) -> Incident | None:
        """The newest open incident."""
        return self.open_incidents[-1] if self.open_incidents else None

    @property
    def stop_wanted(self) -> OrderRecord | None:
        """The stop that was asked for and that the run has not yet come to the end of."""
        return self.order if self.order is not None and self.order.order == SAVE_AND_STOP else None

    def next_attempt(self, lineage: int) -> str:
        """The name of the attempt to begin in `lineage`: one that no attempt has ever had."""
        last = AttemptId.parse(self.attempt.name) if self.attempt is not None else None
        first = (
            last.next() if last is not None and last.lineage == lineage else AttemptId(lineage, 0)
        )
        return str(AttemptId(lineage, first.number + self.attempts_lost))

    def has_failed(self, node: str) -> bool:
        record = self.nodes.get(node)
        return record is not None and record.role == "failed"

    def chain(self) -> tuple[Checkpoint, ...]:
        """Checkpoints that the current attempt descends from or made, oldest first, rejected ones
        included."""
        reach: dict[str, float] = {}
        name, limit = (self.attempt.name if self.attempt else ""), float("inf")
        while name and name not in reach:
            reach[name] = limit
            # A parent's saves beyond the child's start were abandoned with the steps that made
            # them.
            name, limit = self.history.get(name, ("", 0))
        found = [c for c in self.checkpoints if c.attempt in reach and c.step <= reach[c.attempt]]
        return tuple(sorted(found, key=lambda c: (c.step, FASTEST_LAST.index(c.tier))))

    def newest_good(self, *, shared_only: bool = False) -> Checkpoint | None:
        """What a restart restores: the newest of the live chain not rejected, of those of one step
        the fastest.

        An unhealthy one only for want of others.

        Args:
            shared_only: for whoever reads the run directory alone and has no agents.
        """
        good = [c for c in self.chain() if not c.rejected and not (shared_only and c.is_held)]
        best = [c for c in good if c.healthy] or good
        return best[-1] if best else None

    def reconsidered(self) -> tuple[Checkpoint, ...]:
        """`checkpoints`, none of them rejected if all are: the storage may be mended, and each is
        read again anyhow."""
        if self.newest_good() is not None:
            return self.checkpoints
        return tuple(replace(checkpoint, rejected=False) for checkpoint in self.checkpoints)


def fold(state: RunState, entry: Entry) -> RunState:
    """The run after `entry`. Any prefix of a journal folds; a kind this version does not know
    changes nothing."""
    handler = HANDLERS.get(type(entry.event))
    return state if handler is None else handler(state, entry, entry.event)


def _run_created(s: RunState, entry: Entry, event: RunCreated) -> RunState:
    return replace(s, stage="assembling", created=event, created_time=entry.time)


def _lineage_opened(s: RunState, entry: Entry, event: LineageOpened) -> RunState:
    # A run that was done goes on, for example for more steps.
    stage = "assembling" if s.stage == "finished" else s.stage
    return replace(
        s, stage=stage, finished=None, lineage=event.lineage, config_sha256=event.config_sha256
    )


def _supervisor_started(s: RunState, entry: Entry, event: SupervisorStarted) -> RunState:
    s = replace(s, leader=max(s.leader, event.leader))
    if s.stage not in ("stopped", "halted"):
        return s
    # A person has looked and started it again: budgets begin anew after a halt.
    if s.stage == "halted":
        s = replace(s, restarts={}, checkpoints=s.reconsidered())
    return replace(s, stage="assembling", order=None, question="")


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
        stage="starting",
        attempt=attempt,
        generation=max(s.generation, event.generation),
        open_incidents=restored,
        history={**s.history, entry.attempt: (event.parent, start)},
        settled_saves=frozenset(),
        validations=frozenset(),
        dropped_metrics=frozenset(),
        attempts_lost=0,
    )


def _in_force(s: RunState, entry: Entry, event: InForceReported) -> RunState:
    return s if s.attempt is None else replace(s, attempt=replace(s.attempt, in_force=True))


def _training_began(s: RunState, entry: Entry, event: TrainingBegan) -> RunState:
    first = tuple(replace(i, first_step=i.first_step or entry.time) for i in s.open_incidents)
    stage = "training" if s.stage == "starting" else s.stage
    return replace(_of_attempt(s, event.generation, began=True), stage=stage, open_incidents=first)


def _attempt_ended(s: RunState, entry: Entry, event: AttemptEnded) -> RunState:
    stage = {"finished": "finishing", "stopped": "stopping"}.get(event.outcome, "recovering")
    return replace(_of_attempt(s, event.generation, outcome=event.outcome or "failed"), stage=stage)


def _failure_seen(s: RunState, entry: Entry, event: FailureSeen) -> RunState:
    incident = Incident(
        number=event.incident,
        generation=event.generation,
        attempt=entry.attempt,
        step=entry.step or 0,
        opened=entry.time,
        node=event.node,
        rank=event.rank,
        what=event.what,
        sign=event.sign,
    )
    stage = "failing" if s.live is not None else s.stage
    incidents = max(s.incidents, event.incident)
    known = (*s.open_incidents, incident)
    return replace(
        s, stage=stage, incidents=incidents, open_incidents=known, last_incident=event.what
    )


def _generation_killed(s: RunState, entry: Entry, event: GenerationKilled) -> RunState:
    return _of_attempt(s, event.generation, killed=True)


def _incident_diagnosed(s: RunState, entry: Entry, event: IncidentDiagnosed) -> RunState:
    restarts = {**s.restarts, event.cause: s.restarts.get(event.cause, 0) + 1}
    strikes, in_all = restarts[event.cause], sum(restarts.values())
    known = tuple(
        replace(
            i,
            cause=event.cause,
            detail=event.detail,
            culprit=event.node,
            strikes=strikes,
            strikes_in_all=in_all,
        )
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
    # A snapshot is soon gone: a run that only ever gets from one to the next has not got anywhere.
    progress = step > s.furthest_save and not made.is_held
    return replace(
        s,
        checkpoints=(*s.checkpoints, made),
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
    return replace(s, checkpoints=kept, retired=(*s.retired, event.path)[-RETIRED_REMEMBERED:])


def _save_abandoned(s: RunState, entry: Entry, event: SaveAbandoned) -> RunState:
    abandoned = (*s.abandoned, event.path)[-RETIRED_REMEMBERED:]
    return replace(s, settled_saves=s.settled_saves | {event.path}, abandoned=abandoned)


def _order_given(s: RunState, entry: Entry, event: OrderGiven) -> RunState:
    stops = event.order == SAVE_AND_STOP and s.stage in ("starting", "training")
    order = OrderRecord(event.number, event.order, event.reason, leader=s.leader)
    return replace(
        s, order=order, orders=max(s.orders, event.number), stage="stopping" if stops else s.stage
    )


def _order_ended(s: RunState, entry: Entry, event: OrderEnded) -> RunState:
    if s.order is None or s.order.number != event.number:
        return s
    if event.outcome == SUPERSEDED:
        return replace(s, order=None)
    return replace(s, order=replace(s.order, outcome=event.outcome))


def _validation(s: RunState, entry: Entry, event: ValidationMeasured) -> RunState:
    newest = event if event.name == HELD_OUT else s.validation
    return replace(
        s, validation=newest, validations=s.validations | {(event.name, entry.step or 0)}
    )


def _metrics_dropped(s: RunState, entry: Entry, event: MetricsDropped) -> RunState:
    return replace(s, dropped_metrics=s.dropped_metrics | {event.rank})


def _run_finished(s: RunState, entry: Entry, event: RunFinished) -> RunState:
    # The last weights are in the run directory: nothing is to stay on nodes that others will use.
    return replace(_at_rest(s, SHARED), stage="finished", finished=event)


def _run_stopped(s: RunState, entry: Entry, event: RunStopped) -> RunState:
    return replace(
        _at_rest(s, SHARED, NODE), stage="stopped", stopped_by=event.by, saved_step=event.saved_step
    )


def _run_halted(s: RunState, entry: Entry, event: RunHalted) -> RunState:
    return replace(_at_rest(s, SHARED, NODE), stage="halted", question=event.question)


def _at_rest(s: RunState, *tiers: str) -> RunState:
    """Agents leave, and what they hold in memory goes with them; of `tiers` checkpoints stay."""
    stay = tuple(c for c in s.checkpoints if c.tier in tiers)
    return replace(s, checkpoints=stay, open_incidents=(), order=None)


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
        orders=s.orders + lost,
        incidents=s.incidents + lost,
    )


def _of_attempt(s: RunState, generation: int, **changes: Any) -> RunState:
    """`s` with its attempt changed, if it is the one of `generation`."""
    if s.attempt is None or s.attempt.generation != generation:
        return s
    return replace(s, attempt=replace(s.attempt, **changes))


RETIRED_REMEMBERED = 64

HANDLERS: Mapping[type[Event], Callable[[RunState, Entry, Any], RunState]] = {
    RunCreated: _run_created,
    LineageOpened: _lineage_opened,
    SupervisorStarted: _supervisor_started,
    AgentsAdopted: _agents_adopted,
    NodeJoined: _node_joined,
    NodeFailed: _node_failed,
    NodePromoted: _node_promoted,
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
"""The state machine: what each kind of line does. Kinds not listed (notes, stalls) change
nothing."""
