"""What a run is, as its journal tells it: `Stage`, `TRANSITIONS` and `RunState`.

Theory of operation
===================

A run outlives every process that works on it. What it is at any moment is therefore no object in
some process: it is the journal, and `RunState` is what `fold` (fold.py) makes of the journal's
entries. `fold` takes entries alone, no clock, no cluster, no message of an agent. So whoever folds
the same lines stands in the same place: the supervisor that wrote them, the one that comes after
its death, `opt-train status`, a test. What the journal does not say (who is connected, which phase
a rank is in, the newest loss) is a `ClusterView`, and agents report it again to every supervisor.

There are two small machines. The *attempt* (attempt.py) begins with `attempt_started` and has
living ranks, or may have, until its `outcome` is journalled. The *stage* says what the run waits
for, and which rules decide (supervisor/rules/table.py). The attempt's machine drives the stage's:
an attempt starts, trains, fails, ends, and each of these events moves the stage by one row of
`TRANSITIONS`. No handler sets a stage. An event without a row in the current stage leaves it where
it is: a node that joins, a checkpoint, a note.

Three ways of stopping. They differ in what is known about the ranks, and so in what must be done
before the run may rest:

- *By order* (`stopping`): ranks live and are asked to save and stop. They agree on one step, save
  it, and leave by themselves with their state in a checkpoint. This is the only way that loses no
  step, and the only one that waits.
- *By force* (still `stopping`, the order `withdrawn`): the ranks did not agree in time, have done
  nothing worth saving, or a person asked twice. They are killed as after a failure, but nothing is
  diagnosed, for nothing went wrong.
- *At rest already* (`assembling`, `recovering`, or `stopping` when the last rank has gone): no rank
  lives, so `run_stopped` follows at once. A stop that comes while an attempt fails waits for the
  diagnosis, and takes this way then: the incident is on record before the run rests.

Taking over. A supervisor that starts finds the stage its predecessor left. If the attempt may have
living ranks, its `leader` is an older one than the run's: until every rank has been seen, training
or ended, and `agents_adopted` gives the attempt the new leader, nothing is sent to the ranks. That
is no stage of its own, because the journal cannot know who is alive; it is derived from the two
numbers. In the stages without ranks there is nothing to take over, and the new supervisor decides
at once.

Damage. A line that does not verify is skipped, and the lines behind it were written by somebody who
had read it. So the events that name a stage by themselves do so from any stage (`REGARDLESS`), and
numbers that fence (generation, leader, order) leave room for what a lost line may have used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from opt_logbook.record.attempt import AttemptId
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    Event,
    FailureSeen,
    LineageOpened,
    OrderGiven,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SupervisorStarted,
    TrainingBegan,
    ValidationMeasured,
)
from opt_logbook.record.hardware import Offence
from opt_logbook.record.node_events import GrowthBegan, LemonNoted, ReplacementBegan
from opt_logbook.record.stability_events import RollbackBegan

from opt_train.diagnosis.causes import Cause
from opt_train.protocol.orders import Order, RollBack, SaveAndStop
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import FASTEST_LAST, MEMORY, Checkpoint
from opt_train.run.finding import NotedFinding
from opt_train.run.hold import HOLD_OF, Hold
from opt_train.run.incident import Incident
from opt_train.run.instability import Instability, LrCut
from opt_train.run.ledger import Ledger
from opt_train.run.settled_saves import SettledSaves

REPLACED = "replaced"
"""The outcome of an attempt that was ended to replace or add a node, without a failure."""
ROLLED_BACK = "rolled back"
"""The outcome of an attempt that was given up for an earlier state, without a failure."""
VACANT = ""
"""What took the place of a node when no buffer node was left: nothing."""
OBEYED, WITHDRAWN, SUPERSEDED = "obeyed", "withdrawn", "superseded"
"""Outcomes of orders. Superseded: a stop that somebody has countermanded by starting the run
again."""


NODES_END = "the time limit of the nodes"
NODES_LOST = "too few nodes to go on with"
"""Who stopped a run whose nodes the scheduler takes back, or does without: the supervisor gives
them back, waits for others and goes on."""


class Stage(StrEnum):
    """What the run waits for."""

    NEW = "new"
    """The journal has no line yet. The first supervisor, or a standalone `train`, creates the
    run."""
    ASSEMBLING = "assembling"
    """No rank lives. The nodes that are to train dial in and warm their ranks, and the checkpoint
    to start from is verified; a node that does not come is replaced by a buffer node."""
    STARTING = "starting"
    """An attempt is journalled and its ranks begin: rendezvous, restore, the first step. What is
    really in force is read back and compared before the first step counts."""
    TRAINING = "training"
    """The first step is done. Steps are counted, checkpoints committed, and signs of failure
    watched for."""
    STOPPING = "stopping"
    """A stop was ordered while ranks may live, or the ranks were asked to stop by somebody else
    (a scheduler's signal) and have left. The run rests when none is left."""
    FAILING = "failing"
    """A failure was seen. All ranks of the generation are killed, after their stacks; what they and
    their logs still say is collected until every node is known to be empty, and then the cause is
    named."""
    REPLACING = "replacing"
    """Nothing has failed, but a node was found unfit or a place is vacant, a checkpoint has been
    committed since, and a buffer node is ready: the ranks are ended to begin again from there with
    that one. Or a rollback was ordered that they cannot do in place."""
    RECOVERING = "recovering"
    """As assembling, after an attempt that ended unfinished: what the diagnosis asks for (another
    node, an older checkpoint, a halt) is done first."""
    FINISHING = "finishing"
    """All ranks are done and have left; the result is still to be journalled."""
    FINISHED = "finished"
    """All steps are done. A new lineage, for example with more steps, goes on from here."""
    STOPPED = "stopped"
    """A person or the scheduler stopped the run, and its state is saved as far as it could be.
    Whoever starts it again goes on."""
    HALTED = "halted"
    """A person must decide; the question is in the journal. Whoever starts it again has answered,
    and all budgets of restarts begin anew."""


TERMINAL = frozenset({Stage.FINISHED, Stage.STOPPED, Stage.HALTED})
"""Stages in which nothing more happens until somebody starts the run again."""


INTERRUPTED = "interrupted"
"""Shown for a run whose stage is not terminal and whose lock nobody holds. No stage: the journal of
a run whose supervisor was killed cannot say so."""
HELD = "held"
"""Shown for a run that a person holds and that nobody leads. No stage: a run may be held in any."""


class EventCase(NamedTuple):
    """An event that moves the stage by what it says, not by its kind alone."""

    event: type[Event]
    what: str


Trigger = type[Event] | EventCase

ENDED_FINISHED = EventCase(AttemptEnded, "finished")
ENDED_STOPPED = EventCase(AttemptEnded, "stopped")
ENDED_REPLACED = EventCase(AttemptEnded, REPLACED)
ENDED_ROLLED_BACK = EventCase(AttemptEnded, ROLLED_BACK)
ENDED_FAILED = EventCase(AttemptEnded, "failed")
STOP_ORDERED = EventCase(OrderGiven, SaveAndStop.kind)
RANKS_FAILED = EventCase(FailureSeen, "ranks may live")


ENDINGS: Mapping[str, EventCase] = {
    case.what: case for case in (ENDED_FINISHED, ENDED_STOPPED, ENDED_REPLACED, ENDED_ROLLED_BACK)
}
"""Outcome of an attempt -> what the stage goes by. Any other outcome is a failure."""


def trigger_of(event: Event, *, lives: bool) -> Trigger:
    """What of `event` the stage goes by. `lives`: an attempt may have living ranks."""
    match event:
        case AttemptEnded(outcome=outcome):
            return ENDINGS.get(outcome, ENDED_FAILED)
        case OrderGiven(order=order):
            return EventCase(OrderGiven, order)
        case FailureSeen():
            # With nothing to kill there is nothing to wait for: only a damaged journal has this.
            return RANKS_FAILED if lives else FailureSeen
        case _:
            return type(event)


TRANSITIONS: Mapping[tuple[Stage, Trigger], Stage] = {
    (Stage.NEW, RunCreated): Stage.ASSEMBLING,
    (Stage.ASSEMBLING, AttemptStarted): Stage.STARTING,
    (Stage.ASSEMBLING, RunStopped): Stage.STOPPED,
    (Stage.ASSEMBLING, RunHalted): Stage.HALTED,
    (Stage.STARTING, TrainingBegan): Stage.TRAINING,
    (Stage.STARTING, STOP_ORDERED): Stage.STOPPING,
    (Stage.STARTING, RANKS_FAILED): Stage.FAILING,
    (Stage.STARTING, ENDED_FINISHED): Stage.FINISHING,
    (Stage.STARTING, ENDED_STOPPED): Stage.STOPPING,
    (Stage.STARTING, ENDED_FAILED): Stage.RECOVERING,
    (Stage.STARTING, ENDED_ROLLED_BACK): Stage.ASSEMBLING,
    (Stage.TRAINING, STOP_ORDERED): Stage.STOPPING,
    (Stage.TRAINING, RANKS_FAILED): Stage.FAILING,
    (Stage.TRAINING, ENDED_FINISHED): Stage.FINISHING,
    (Stage.TRAINING, ENDED_STOPPED): Stage.STOPPING,
    (Stage.TRAINING, ENDED_FAILED): Stage.RECOVERING,
    (Stage.TRAINING, ENDED_ROLLED_BACK): Stage.ASSEMBLING,
    (Stage.TRAINING, ReplacementBegan): Stage.REPLACING,
    (Stage.TRAINING, GrowthBegan): Stage.REPLACING,
    (Stage.TRAINING, RollbackBegan): Stage.REPLACING,
    (Stage.REPLACING, ENDED_REPLACED): Stage.ASSEMBLING,
    (Stage.REPLACING, ENDED_ROLLED_BACK): Stage.ASSEMBLING,
    (Stage.STOPPING, RANKS_FAILED): Stage.FAILING,
    (Stage.STOPPING, ENDED_STOPPED): Stage.STOPPING,
    (Stage.STOPPING, ENDED_FINISHED): Stage.FINISHING,
    (Stage.STOPPING, ENDED_FAILED): Stage.RECOVERING,
    (Stage.STOPPING, ENDED_ROLLED_BACK): Stage.ASSEMBLING,
    (Stage.STOPPING, RunStopped): Stage.STOPPED,
    (Stage.FAILING, ENDED_FAILED): Stage.RECOVERING,
    (Stage.RECOVERING, AttemptStarted): Stage.STARTING,
    (Stage.RECOVERING, RunStopped): Stage.STOPPED,
    (Stage.RECOVERING, RunHalted): Stage.HALTED,
    (Stage.FINISHING, RunFinished): Stage.FINISHED,
    (Stage.FINISHED, LineageOpened): Stage.ASSEMBLING,
    (Stage.STOPPED, SupervisorStarted): Stage.ASSEMBLING,
    (Stage.HALTED, SupervisorStarted): Stage.ASSEMBLING,
    # A standalone `train` writes no `supervisor_started`: its attempt is the start.
    (Stage.STOPPING, AttemptStarted): Stage.STARTING,
    (Stage.FINISHING, AttemptStarted): Stage.STARTING,
    (Stage.STOPPED, AttemptStarted): Stage.STARTING,
    (Stage.HALTED, AttemptStarted): Stage.STARTING,
}
"""(Stage, what happens) -> the stage after it; what is not listed changes no stage. Drawn in
docs/architecture.md."""

REGARDLESS: Mapping[Trigger, Stage] = {
    RunCreated: Stage.ASSEMBLING,
    AttemptStarted: Stage.STARTING,
    RANKS_FAILED: Stage.FAILING,
    ENDED_FINISHED: Stage.FINISHING,
    ENDED_STOPPED: Stage.STOPPING,
    ENDED_REPLACED: Stage.ASSEMBLING,
    ENDED_ROLLED_BACK: Stage.ASSEMBLING,
    ENDED_FAILED: Stage.RECOVERING,
    RunFinished: Stage.FINISHED,
    RunStopped: Stage.STOPPED,
    RunHalted: Stage.HALTED,
}
"""Where the run is after these, when `TRANSITIONS` has no row: lines between are damaged, and what
the event says of the run holds all the same."""


def next_stage(stage: Stage, event: Event, *, lives: bool) -> Stage:
    """The stage after `event`. `lives`: an attempt may have living ranks when it happens."""
    trigger = trigger_of(event, lives=lives)
    return TRANSITIONS.get((stage, trigger)) or REGARDLESS.get(trigger, stage)


@dataclass(frozen=True, slots=True)
class Node:
    """A node that ever joined or failed. `role` is ``active``, ``buffer`` or ``failed``; a failed
    one stays so until it returns from a preflight that it passed."""

    role: str
    slots: int = 0
    failures: int = 0
    """How often it was taken out."""
    cause: str = ""
    """Of the last time."""
    failed_at: float = 0.0
    """When, in Unix seconds."""


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """An order that was given. `outcome` is empty while it is outstanding."""

    order: Order
    outcome: str = ""
    leader: int = 0
    """The supervisor that gave it."""

    @property
    def number(self) -> int:
        return self.order.number

    @property
    def reason(self) -> str:
        return self.order.reason


@dataclass(frozen=True, slots=True)
class RunState:
    """The whole run. `RunState()` is the run that has not begun."""

    stage: Stage = Stage.NEW
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
    """Node that a place is named after -> the last node that has taken it, if it is another."""
    vacated: frozenset[str] = frozenset()
    """Places that nobody has, by the nodes they are named after."""
    offences: tuple[Offence, ...] = ()
    """What nodes of this run were taken out for, of what is to be remembered across runs."""
    lemons: Mapping[str, LemonNoted] = field(default_factory=dict)
    """Nodes of the run that are repeat offenders."""
    findings: tuple[NotedFinding, ...] = ()
    """What probes found, oldest first."""
    withheld: frozenset[tuple[str, tuple[str, ...]]] = frozenset()
    """(Action, nodes) that the current attempt's journal says would be done in another mode."""
    generation: int = 0
    attempt: Attempt | None = None
    history: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Attempt -> (parent, start step): the tree that the live chain is a path of."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """In the order they were committed."""
    settled_saves: SettledSaves = field(default_factory=SettledSaves)
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
    orders_given: int = 0
    """Over the life of the run: the number of the newest."""
    orders: tuple[OrderRecord, ...] = ()
    """The queue: outstanding orders, oldest first, and a stop until the run has come to rest."""
    fabric_settings: Mapping[str, str] | None = None
    """Variables of NCCL and its like that the newest attempt's ranks had; None: none is known."""
    ledger: Ledger = ()
    """Lasting orders that the ranks obeyed."""
    instability: Instability | None = None
    """The trouble of training that is being answered."""
    lr_cut: LrCut | None = None
    """What the supervisor has taken of the learning rate last."""
    instabilities: int = 0
    """Such troubles so far."""
    probe: RollBack | None = None
    """The newest rollback, if the data is to be probed with it and has not been."""
    probed: int = 0
    """The newest rollback whose probe of the data is on record."""
    replayed: int = 0
    """The newest rollback whose steps, trained again, are on record as the same or not."""
    validations: frozenset[tuple[str, int]] = frozenset()
    """(name, step) of validations journalled in the current attempt."""
    validation: ValidationMeasured | None = None
    """The newest of the held-out part of the corpus; named sets are in the journal alone."""
    dropped_metrics: frozenset[int] = frozenset()
    """Ranks of the current attempt whose dropped metrics are journalled."""
    hold: Hold | None = None
    """No attempt begins while there is one."""
    stopped_by: str = ""
    question: str = ""
    saved_step: int = -1
    finished: RunFinished | None = None

    @property
    def live(self) -> Attempt | None:
        """The attempt that may have living ranks."""
        return self.attempt if self.attempt is not None and not self.attempt.outcome else None

    @property
    def goes_on_by_itself(self) -> bool:
        """Whether the supervisor that has brought the run to rest takes it up again, with other
        nodes: those it had are gone, or it was held and has been resumed meanwhile."""
        by = self.stopped_by
        awaited = by in (NODES_END, NODES_LOST) or by.startswith(HOLD_OF)
        return self.stage is Stage.STOPPED and self.hold is None and awaited

    @property
    def incident(self) -> Incident | None:
        """The newest open incident."""
        return self.open_incidents[-1] if self.open_incidents else None

    @property
    def takes_orders(self) -> bool:
        """Whether a step may still be trained under an order that is given now."""
        return self.stop_wanted is None and self.stage not in (*TERMINAL, Stage.FINISHING)

    @property
    def stop_wanted(self) -> OrderRecord | None:
        """The stop that was asked for and that the run has not yet come to the end of."""
        stops = (record for record in self.orders if isinstance(record.order, SaveAndStop))
        return next(stops, None)

    @property
    def outstanding_orders(self) -> tuple[OrderRecord, ...]:
        """Orders that neither were obeyed nor withdrawn, oldest first."""
        return tuple(record for record in self.orders if not record.outcome)

    @property
    def rollback(self) -> RollBack | None:
        """The rollback that was ordered and has not come about, in place or by a restart."""
        ordered = (record.order for record in self.outstanding_orders)
        return next((order for order in ordered if isinstance(order, RollBack)), None)

    @property
    def settled_order(self) -> int:
        """The number up to which orders are no news to ranks that begin now."""
        waiting = self.outstanding_orders
        return waiting[0].number - 1 if waiting else self.orders_given

    def next_attempt(self, lineage: int) -> str:
        """The name of the attempt to begin in `lineage`: one that no attempt has ever had."""
        last = AttemptId.parse(self.attempt.name) if self.attempt is not None else None
        first = (
            last.next() if last is not None and last.lineage == lineage else AttemptId(lineage, 0)
        )
        # Ranks may have become the attempt of a rollback, and nobody knows of it.
        reserved = self.rollback is not None and self.rollback.attempt == str(first)
        return str(AttemptId(lineage, first.number + self.attempts_lost + reserved))

    @property
    def failed_nodes(self) -> frozenset[str]:
        return frozenset(name for name, node in self.nodes.items() if node.role == "failed")

    def has_failed(self, node: str) -> bool:
        record = self.nodes.get(node)
        return record is not None and record.role == "failed"

    def places_of(self, node: str) -> frozenset[str]:
        """The places that `node` was the last to take, by the nodes they are named after. Those of
        earlier allocations are among them."""
        taken = {place for place, last in self.replacements.items() if last == node}
        # One that stands by again may find its own place taken by another.
        own = {node} if node not in self.replacements or not taken else set()
        return frozenset(taken | own)

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

        An unhealthy one only for want of others. While a rollback is ordered, none beyond its
        step, if there is one before.

        Args:
            shared_only: for whoever reads the run directory alone and has no agents.
        """
        good = [
            c for c in self.chain() if not c.rejected and not (shared_only and c.is_with_agents)
        ]
        if self.rollback is None or not good:
            return _newest_of(good)
        wanted = self.rollback.step
        found = _newest_of([c for c in good if c.step <= wanted])
        # Without a snapshot of it the beginning is that of ranks that restore nothing.
        return found if found is not None or wanted == 0 else good[0]

    def rollback_target(self, step: int) -> Checkpoint | None:
        """What a rollback to `step` restores: the newest good one of the live chain at or before
        it; None: there is none."""
        return _newest_of([c for c in self.chain() if not c.rejected and c.step <= step])

    @property
    def saved_for_later(self) -> int:
        """The step that a run which rests now goes on from; -1: nothing is saved."""
        # The memory of agents goes with them, so what is in it alone was not saved.
        saved = (c.step for c in self.chain() if not c.rejected and c.tier != MEMORY)
        return max(saved, default=-1)

    def speaks_against_checkpoint(self, cause: str) -> bool:
        """Whether a failure of `cause` says that what the attempt began with is bad: its ranks
        could not restore it."""
        attempt = self.attempt
        return (
            cause == Cause.CORRUPT_CHECKPOINT
            and attempt is not None
            and attempt.checkpoint != ""
            and not attempt.began
        )

    def restarts_after(self, cause: str) -> Mapping[str, int]:
        """`restarts` with one more failure of `cause`.

        One that speaks against a checkpoint uses up nothing: the next attempt begins with another
        one, of which there are only so many, so it ends by itself.
        """
        if self.speaks_against_checkpoint(cause):
            return self.restarts
        return {**self.restarts, cause: self.restarts.get(cause, 0) + 1}

    def reconsidered(self) -> tuple[Checkpoint, ...]:
        """`checkpoints`, none of them rejected if all are: the storage may be mended, and each is
        read again anyhow."""
        if self.newest_good() is not None:
            return self.checkpoints
        return tuple(replace(checkpoint, rejected=False) for checkpoint in self.checkpoints)


def _newest_of(good: Sequence[Checkpoint]) -> Checkpoint | None:
    """The last of them, an unhealthy one only for want of others."""
    best = [checkpoint for checkpoint in good if checkpoint.healthy] or good
    return best[-1] if best else None
