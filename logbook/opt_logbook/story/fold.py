"""From journal and metrics to a `Story`: one pass over the lines, then what they add up to.

Pure: a `Reading` and metrics in, a `Story` out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from opt_logbook.record import metrics
from opt_logbook.record.attempt import AttemptId
from opt_logbook.record.chain import Reading
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    Entry,
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
from opt_logbook.story.records import AttemptRecord, IncidentRecord, Recorded, Story, Totals


def fold_story(reading: Reading, measured: metrics.MetricsReading) -> Story:
    """Tell the run from its journal and metrics."""
    by_name: dict[str, AttemptRecord] = {}
    newest_attempt: AttemptRecord | None = None
    incidents: dict[int, IncidentRecord] = {}
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
            # A run that was stopped or halted was taken up again: that end was none.
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
            # Any line that names an attempt opens it: the one with its start may be damaged.
            newest_attempt = by_name[entry.attempt] = AttemptRecord(entry.attempt)
        attempt = by_name.get(entry.attempt, newest_attempt)
        if attempt is None:
            before.append(entry)
        else:
            _fold_into_attempt(attempt, entry)
    attempts = _in_order(by_name.values())
    newest = [
        value for line in measured.lines if (value := metrics.number_of(line, "time")) is not None
    ]
    # Never the clock: rendered next year, the page has the same bytes (invariant 12). The largest
    # and not the last, since a clock may jump back.
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


def _in_order(attempts: Iterable[AttemptRecord]) -> list[AttemptRecord]:
    """By name, which counts up: of an attempt whose first lines are damaged a late line may be the
    only one."""
    found = list(attempts)
    try:
        return sorted(found, key=lambda attempt: AttemptId.parse(attempt.name))
    except ValueError:
        return found


def _fold_into_attempt(attempt: AttemptRecord, entry: Entry) -> None:
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


def _fold_into_incidents(incidents: dict[int, IncidentRecord], entry: Entry) -> bool:
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
    incident = incidents.setdefault(number, IncidentRecord(number))
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


def _measure(
    attempts: list[AttemptRecord], lines: Iterable[Mapping[str, Any]], until: float
) -> None:
    """First and last step of each attempt, and until when it is known to have gone on."""
    steps: dict[str, list[int]] = {}
    for line in lines:
        steps.setdefault(line["attempt"], []).append(line["step"])
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=False):
        taken = steps.get(attempt.name, [])
        attempt.first_step, attempt.last_step = (min(taken), max(taken)) if taken else (None, None)
        if attempt.ended and attempt.began:
            # Metrics are not fsynced and may lack the newest steps; the journal's line is durable.
            attempt.last_step = max(attempt.last_step or 0, attempt.ended.step or 0)
        if attempt.ended:
            attempt.until = attempt.ended.time
        else:
            attempt.until = following.since if following else until


def _kept(attempts: list[AttemptRecord], lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of the live chain: the newest attempt's, and before its start its parent's, and so on
    to the start.

    Where the parent is not known, damaged lines hid it, and the attempt before is taken for it.
    """
    index_of = {attempt.name: index for index, attempt in enumerate(attempts)}
    ranges: dict[str, tuple[int, float]] = {}
    index, limit = len(attempts) - 1, math.inf
    # No attempt twice: in a damaged journal parents may form a circle.
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
    # A checkpoint of step n has the work of step n: line n is the parent's, and the child begins at
    # n + 1.
    return bounds[0] < step <= bounds[1]


def _totals(
    created: Recorded[RunCreated] | None,
    attempts: list[AttemptRecord],
    incidents: list[IncidentRecord],
    lines: Iterable[Mapping[str, Any]],
    kept: list[dict[str, Any]],
    until: float,
) -> Totals:
    begin = until
    if created:
        begin = created.time
    elif attempts:
        begin = attempts[0].since
    wall = max(0.0, until - begin)
    kept_seconds = sum(_seconds(line) for line in kept)
    redone = max(0.0, sum(_seconds(line) for line in lines) - kept_seconds)
    # Each share takes what those before it leave, so that they add up whatever is missing.
    kept_seconds = min(kept_seconds, wall)
    redone = min(redone, wall - kept_seconds)
    down = min(_down_seconds(incidents, begin, until), wall - kept_seconds - redone)
    steps = max([line["step"] for line in kept] + [a.from_step for a in attempts[-1:]], default=0)
    reported = metrics.number_of(kept[-1], "tokens") if kept else None
    tokens = 0
    if reported is not None:
        tokens = int(reported)
    elif created:
        tokens = steps * created.event.tokens_per_step
    return Totals(
        wall=wall,
        kept=kept_seconds,
        redone=redone,
        down=down,
        other=wall - kept_seconds - redone - down,
        steps=steps,
        tokens=tokens,
        checkpoints=sum(
            saved.event.tier == "shared" for attempt in attempts for saved in attempt.saved
        ),
    )


def _down_seconds(incidents: list[IncidentRecord], begin: float, until: float) -> float:
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
