"""A run as its chronicle sees it: attempts, incidents, totals, and the journal lines behind each.

Data alone; `fold.py` makes it. What is missing (a damaged line, a run that still goes on) is None
or empty here, and the chronicle states that it is missing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from opt_logbook.record import metrics
from opt_logbook.record.chain import Reading
from opt_logbook.record.events import (
    HELD_OUT,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    Entry,
    Event,
    FailureSeen,
    GenerationKilled,
    IncidentClosed,
    IncidentDiagnosed,
    LineageOpened,
    NodeFailed,
    NodePromoted,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    TrainingBegan,
    ValidationMeasured,
)

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Recorded(Generic[E]):
    """An event, and the journal line that tells it."""

    entry: Entry
    event: E

    @property
    def line(self) -> int:
        return self.entry.seq

    @property
    def time(self) -> float:
        return self.entry.time

    @property
    def step(self) -> int | None:
        return self.entry.step


@dataclass(slots=True)
class AttemptRecord:
    """A stretch in which `step` only grew."""

    name: str
    started: Recorded[AttemptStarted] | None = None
    began: Recorded[TrainingBegan] | None = None
    ended: Recorded[AttemptEnded] | None = None
    first_step: int | None = None
    """The first and last step it took, by its metrics; None: none is known."""
    last_step: int | None = None
    until: float = 0.0
    """When it ended, or the newest that is known of it."""
    saved: list[Recorded[CheckpointCommitted]] = field(default_factory=list)
    validated: list[Recorded[ValidationMeasured]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    """The lines of the journal that name it, or that name none and follow one that does, in
    order."""

    @property
    def from_step(self) -> int:
        if self.started:
            return self.started.step or 0
        return max(0, self.first_step - 1) if self.first_step is not None else 0

    @property
    def first_line(self) -> int:
        return self.entries[0].seq if self.entries else 0

    @property
    def since(self) -> float:
        # Its first line may be damaged: the next that names it is later, but not by much.
        if self.started:
            return self.started.time
        return self.entries[0].time if self.entries else 0.0


@dataclass(slots=True)
class IncidentRecord:
    """Something that broke, from the first sign to the end."""

    number: int
    seen: list[Recorded[FailureSeen]] = field(default_factory=list)
    """The first sign, and further ones of the same incident."""
    killed: Recorded[GenerationKilled] | None = None
    diagnosed: Recorded[IncidentDiagnosed] | None = None
    failed_nodes: list[Recorded[NodeFailed]] = field(default_factory=list)
    promoted: list[Recorded[NodePromoted]] = field(default_factory=list)
    rejected: list[Recorded[CheckpointRejected]] = field(default_factory=list)
    """Checkpoints that should have been restored and did not verify while this was the newest open
    incident."""
    restarts: list[Recorded[AttemptStarted]] = field(default_factory=list)
    """Attempts that were started to recover from it."""
    closed: Recorded[IncidentClosed] | None = None

    @property
    def lines(self) -> tuple[int, ...]:
        recorded: list[Recorded[Any]] = [
            *self.seen,
            *self.failed_nodes,
            *self.promoted,
            *self.rejected,
            *self.restarts,
        ]
        recorded += [one for one in (self.killed, self.diagnosed, self.closed) if one is not None]
        return tuple(sorted(one.line for one in recorded))


@dataclass(frozen=True, slots=True)
class Totals:
    """Where the time went, in seconds, and what it bought.

    `kept` is the time of the steps whose work is in the newest state; `redone` that of steps which
    were lost and done again; `down` the time from a failure to the first new step, counted once
    where failures overlap; `other` is the rest: starts, checkpoints, validation, pauses. `wall` is
    all of it. The effective training time ratio is kept / wall.
    """

    wall: float
    kept: float
    redone: float
    down: float
    other: float
    steps: int
    tokens: int
    checkpoints: int

    @property
    def effective_ratio(self) -> float | None:
        return self.kept / self.wall if self.wall > 0 else None


@dataclass(slots=True)
class Story:
    """A whole run, as far as it went."""

    reading: Reading
    measured: metrics.MetricsReading
    created: Recorded[RunCreated] | None
    aimed: Recorded[LineageOpened] | None
    """The newest lineage that changed how many steps the run is meant to take."""
    end: Recorded[RunFinished] | Recorded[RunStopped] | Recorded[RunHalted] | None
    """How it ended; None: it has not, or nobody could write so."""
    before: list[Entry]
    """Lines before the first attempt."""
    attempts: list[AttemptRecord]
    incidents: list[IncidentRecord]
    totals: Totals
    now: float
    """Time of the newest line; 0: there is none."""
    until: float
    """Where the run's wall clock ends: at its end, or now."""
    kept: tuple[dict[str, Any], ...]
    """Metrics of the steps whose work is in the newest state."""

    @property
    def steps(self) -> int:
        """Steps the run is meant to take, as its lineages left it; 0: no line that can be read says
        so."""
        changed = self.aimed.event.steps if self.aimed else None
        return changed or (self.created.event.steps if self.created else 0)


def by_set(
    validated: Iterable[Recorded[ValidationMeasured]],
) -> dict[str, list[Recorded[ValidationMeasured]]]:
    """What was measured on each validation set by itself: the held-out part first, the others by
    name."""
    sets: dict[str, list[Recorded[ValidationMeasured]]] = {}
    for one in validated:
        sets.setdefault(one.event.name, []).append(one)
    return dict(sorted(sets.items(), key=lambda item: (item[0] != HELD_OUT, item[0])))
