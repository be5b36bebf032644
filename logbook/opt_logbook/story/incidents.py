"""What happened to a run: its attempts, its incidents and where its time went, folded from journal
and metrics.

Pure: a `Reading` and metrics in, a `Story` out. Whatever is missing (a damaged line, a run that
still goes on) stays None or empty, and the chronicle says so.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from opt_logbook.record import metrics
from opt_logbook.record.attempt import AttemptId
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
    SupervisorStarted,
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
class Attempt:
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
        return (
            self.started.time if self.started else (self.entries[0].time if self.entries else 0.0)
        )


@dataclass(slots=True)
class Incident:
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
        told: list[Recorded[Any]] = [
            *self.seen,
            *self.failed_nodes,
            *self.promoted,
            *self.rejected,
            *self.restarts,
        ]
        told += [t for t in (self.killed, self.diagnosed, self.closed) if t is not None]
        return tuple(sorted(t.line for t in told))


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
    attempts: list[Attempt]
    incidents: list[Incident]
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


def fold_story(reading: Reading, measured: metrics.MetricsReading) -> Story:
    """Tell the run from its journal and metrics."""
    by_name: dict[str, Attempt] = {}
    newest_attempt: Attempt | None = None
    incidents: dict[int, Incident] = {}
    before: list[Entry] = []
    created: Recorded[RunCreated] | None = None
    aimed: Recorded[LineageOpened] | None = None
    end: Recorded[RunFinished] | Recorded[RunStopped] | Recorded[RunHalted] | None = None
    for entry in reading.entries:
        event = entry.event
        match event:
            case RunCreated():
                created = created or Recorded(entry, event)
            case LineageOpened() if event.steps is not None:
                aimed = Recorded(entry, event)
            case SupervisorStarted() | AttemptStarted():
                end = None
            case RunFinished():
                end = Recorded(entry, event)
            case RunStopped():
                end = Recorded(entry, event)
            case RunHalted():
                end = Recorded(entry, event)
            case _:
                pass
        if _fold_into_incidents(incidents, entry):
            continue
        if entry.attempt and entry.attempt not in by_name:
            # Any line that names an attempt opens it: the one that told its start may be damaged.
            newest_attempt = by_name[entry.attempt] = Attempt(entry.attempt)
        attempt = by_name.get(entry.attempt, newest_attempt)
        if attempt is None:
            before.append(entry)
        else:
            _fold_into_attempt(attempt, entry)
    attempts = _in_order(by_name.values())
    newest = [
        value for line in measured.lines if (value := metrics.number_of(line, "time")) is not None
    ]
    now = max([entry.time for entry in reading.entries] + newest, default=0.0)
    # A note made days after the end must not make the run longer.
    until = end.time if end else now
    _measure(attempts, measured.lines, until)
    kept = _kept(attempts, measured.lines)
    story_incidents = [incidents[number] for number in sorted(incidents)]
    totals = _totals(created, attempts, story_incidents, measured.lines, kept, until)
    return Story(
        reading,
        measured,
        created,
        aimed,
        end,
        before,
        attempts,
        story_incidents,
        totals,
        now,
        until,
        tuple(kept),
    )


def by_set(
    validated: Iterable[Recorded[ValidationMeasured]],
) -> dict[str, list[Recorded[ValidationMeasured]]]:
    """What was measured on each validation set by itself: the held-out part first, the others by
    name."""
    sets: dict[str, list[Recorded[ValidationMeasured]]] = {}
    for told in validated:
        sets.setdefault(told.event.name, []).append(told)
    return dict(sorted(sets.items(), key=lambda item: (item[0] != HELD_OUT, item[0])))


def _in_order(attempts: Iterable[Attempt]) -> list[Attempt]:
    """By name, which counts up: of an attempt whose first lines are damaged a late line may be the
    only one."""
    found = list(attempts)
    try:
        return sorted(found, key=lambda attempt: AttemptId.parse(attempt.name))
    except ValueError:
        return found


def _fold_into_attempt(attempt: Attempt, entry: Entry) -> None:
    attempt.entries.append(entry)
    match entry.event:
        case AttemptStarted() as event:
            attempt.started = attempt.started or Recorded(entry, event)
        case TrainingBegan() as event:
            attempt.began = attempt.began or Recorded(entry, event)
        case AttemptEnded() as event:
            attempt.ended = Recorded(entry, event)
        case CheckpointCommitted() as event:
            attempt.saved.append(Recorded(entry, event))
        case ValidationMeasured() as event:
            attempt.validated.append(Recorded(entry, event))
        case _:
            pass


def _fold_into_incidents(incidents: dict[int, Incident], entry: Entry) -> bool:
    """Whether an incident tells the line so that its attempt need not."""
    event = entry.event
    if isinstance(event, CheckpointRejected):
        # It happens on the way back from whatever is open.
        newest = max(
            (number for number, incident in incidents.items() if incident.closed is None),
            default=None,
        )
        if newest is not None:
            incidents[newest].rejected.append(Recorded(entry, event))
        return newest is not None
    number = getattr(event, "incident", 0)
    if not number:
        return False
    incident = incidents.setdefault(number, Incident(number))
    match event:
        case FailureSeen():
            incident.seen.append(Recorded(entry, event))
        case GenerationKilled():
            incident.killed = Recorded(entry, event)
        case IncidentDiagnosed():
            incident.diagnosed = Recorded(entry, event)
        case NodeFailed():
            incident.failed_nodes.append(Recorded(entry, event))
        case NodePromoted():
            incident.promoted.append(Recorded(entry, event))
        case AttemptStarted():
            incident.restarts.append(Recorded(entry, event))
        case IncidentClosed():
            incident.closed = Recorded(entry, event)
        case _:
            pass
    return False


def _measure(attempts: list[Attempt], lines: Iterable[Mapping[str, Any]], until: float) -> None:
    """First and last step of each attempt, and until when it is known to have gone on."""
    steps: dict[str, list[int]] = {}
    for line in lines:
        steps.setdefault(line["attempt"], []).append(line["step"])
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=False):
        taken = steps.get(attempt.name, [])
        attempt.first_step, attempt.last_step = (min(taken), max(taken)) if taken else (None, None)
        if attempt.ended and attempt.began:
            attempt.last_step = max(attempt.last_step or 0, attempt.ended.step or 0)
        if attempt.ended:
            attempt.until = attempt.ended.time
        else:
            attempt.until = following.since if following else until


def _kept(attempts: list[Attempt], lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of the live chain: the newest attempt's, and before its start its parent's, and so on
    to the start.

    Where the parent is not known, damaged lines hid it, and the attempt before is taken for it.
    """
    index_of = {attempt.name: index for index, attempt in enumerate(attempts)}
    ranges: dict[str, tuple[int, float]] = {}
    index, limit = len(attempts) - 1, math.inf
    while index >= 0 and attempts[index].name not in ranges:
        attempt = attempts[index]
        ranges[attempt.name] = (attempt.from_step, limit)
        limit = min(limit, attempt.from_step)
        if attempt.started and not attempt.started.event.parent:
            break
        index = (
            index_of.get(attempt.started.event.parent, index - 1) if attempt.started else index - 1
        )
    kept = [
        line
        for line in lines
        if line["attempt"] in ranges and _within(line["step"], ranges[line["attempt"]])
    ]
    return sorted(kept, key=lambda line: int(line["step"]))


def _within(step: int, bounds: tuple[int, float]) -> bool:
    return bounds[0] < step <= bounds[1]


def _totals(
    created: Recorded[RunCreated] | None,
    attempts: list[Attempt],
    incidents: list[Incident],
    lines: Iterable[Mapping[str, Any]],
    kept: list[dict[str, Any]],
    until: float,
) -> Totals:
    begin = created.time if created else (attempts[0].since if attempts else until)
    wall = max(0.0, until - begin)
    kept_seconds = sum(_seconds(line) for line in kept)
    redone = max(0.0, sum(_seconds(line) for line in lines) - kept_seconds)
    # Each share takes what those before it leave, so that they add up whatever is missing.
    kept_seconds = min(kept_seconds, wall)
    redone = min(redone, wall - kept_seconds)
    down = min(_down_seconds(incidents, begin, until), wall - kept_seconds - redone)
    steps = max([line["step"] for line in kept] + [a.from_step for a in attempts[-1:]], default=0)
    told = metrics.number_of(kept[-1], "tokens") if kept else None
    tokens = (
        int(told) if told is not None else steps * (created.event.tokens_per_step if created else 0)
    )
    return Totals(
        wall=wall,
        kept=kept_seconds,
        redone=redone,
        down=down,
        other=wall - kept_seconds - redone - down,
        steps=steps,
        tokens=tokens,
        checkpoints=sum(
            told.event.tier == "shared" for attempt in attempts for told in attempt.saved
        ),
    )


def _down_seconds(incidents: list[Incident], begin: float, until: float) -> float:
    """The union of the times without training: two incidents that overlap do not stop it twice."""
    spans: list[tuple[float, float]] = []
    for incident in incidents:
        if incident.closed is None:
            continue
        event = incident.closed.event
        fell = incident.seen[0].time if incident.seen else incident.closed.time - event.seconds_lost
        if math.isfinite(fell) and math.isfinite(event.down_seconds):
            spans.append((max(begin, fell), min(until, fell + event.down_seconds)))
    total, reached = 0.0, begin
    for fell, back in sorted(spans):
        total += max(0.0, back - max(fell, reached))
        reached = max(reached, back)
    return total


def _seconds(line: Mapping[str, Any]) -> float:
    return metrics.number_of(line, "step_seconds") or 0.0
