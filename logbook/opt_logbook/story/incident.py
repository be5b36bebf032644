"""One incident as the chronicle tells it: seen, cause and evidence, done, cost, outcome."""

from dataclasses import dataclass

from opt_logbook.record.events import IncidentClosed, RunHalted
from opt_logbook.record.run_directory import tier_of
from opt_logbook.story.format import CAUSES, TIERS, clock, duration, listed, many, moment, sentence
from opt_logbook.story.records import AttemptRecord, IncidentRecord, Recorded, Story
from opt_logbook.story.sentences import Sentence

QUOTES_MAX = 12
"""Evidence shown for one incident; the journal has all of it."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A line of evidence. `file` is empty where the supervisor itself observed it."""

    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    sentences: tuple[Sentence, ...]
    quotes: tuple[Quote, ...] = ()


@dataclass(frozen=True, slots=True)
class IncidentStory:
    number: int
    heading: str
    sections: tuple[Section, ...]


def place_of(incident: IncidentRecord, attempts: list[AttemptRecord]) -> int | None:
    """Index of the attempt whose entry tells the incident: the one it led to; None: none has
    followed yet."""
    for index, attempt in enumerate(attempts):
        if attempt.started and attempt.started.event.incident == incident.number:
            return index
    # The line of its restart is damaged, or the run ended first and was taken up later: the next
    # attempt is the nearest.
    first = min(incident.lines, default=0)
    for index, attempt in enumerate(attempts):
        if attempt.first_line > first:
            return index
    return None


def describe_incident(incident: IncidentRecord, story: Story) -> IncidentStory:
    """The incident in five parts. What the journal lacks is named as missing."""
    return IncidentStory(
        incident.number,
        _heading(incident),
        (
            Section("What was seen", _seen(incident)),
            _cause(incident),
            Section("What was done", _done(incident)),
            Section("What it cost", _cost(incident, story)),
            Section("Outcome", _outcome(incident, story)),
        ),
    )


def _heading(incident: IncidentRecord) -> str:
    heading = f"Incident {incident.number}"
    if incident.diagnosed:
        event = incident.diagnosed.event
        where = event.node
        if event.rank >= 0 and event.cause != "node_failure":
            where = f"rank {event.rank} on {event.node}"
        joint = "," if where.startswith("rank") else " on"
        heading += f" · {event.cause}" + (f"{joint} {where}" if where else "")
    if incident.seen:
        heading += f" · {moment(incident.seen[0].time)}"
        if incident.seen[0].step is not None:
            heading += f", after step {incident.seen[0].step:,}"
    return heading


def _seen(incident: IncidentRecord) -> tuple[Sentence, ...]:
    if not incident.seen:
        return (Sentence("The line of the journal that told the first sign is missing."),)
    sentences = []
    shown = incident.seen[0].time
    for sign in incident.seen:
        event = sign.event
        named = event.rank < 0 or f"rank {event.rank} " in event.what.lower()
        where = event.node if named else f"rank {event.rank} on {event.node}"
        of = f", {where}" if where and where not in event.what else ""
        step = ""
        if sign.step is not None:
            step = f", after step {sign.step:,} of attempt {sign.entry.attempt}"
        sentences.append(
            Sentence(f"{clock(sign.time, shown)}{of}{step}: {sentence(event.what)}", (sign.line,))
        )
        shown = sign.time
    return tuple(sentences)


def _cause(incident: IncidentRecord) -> Section:
    title = "Cause and evidence"
    if incident.diagnosed is None:
        return Section(title, (Sentence("It has not been diagnosed."),))
    event, line = incident.diagnosed.event, (incident.diagnosed.line,)
    meaning = CAUSES.get(event.cause)
    sentences = [
        Sentence(f"{event.cause}{f': {meaning}' if meaning else ''}. Blame: {event.blame}.", line)
    ]
    if event.detail:
        sentences.append(Sentence(sentence(event.detail), line))
    most = ""
    if len(event.evidence) > QUOTES_MAX:
        most = f" (the first {QUOTES_MAX} of {len(event.evidence)})"
    confidence = "No evidence."
    if event.evidence:
        confidence = f"Confidence {event.confidence:.0%}, on this evidence{most}:"
    sentences.append(Sentence(confidence, line))
    quotes = [
        Quote(evidence.file, evidence.line, evidence.text)
        for evidence in event.evidence[:QUOTES_MAX]
    ]
    return Section(title, tuple(sentences), tuple(quotes))


def _done(incident: IncidentRecord) -> tuple[Sentence, ...]:
    sentences: list[Sentence] = []
    shown = incident.seen[-1].time if incident.seen else None
    if incident.diagnosed and incident.diagnosed.event.action:
        sentences.append(
            Sentence(
                f"Decided: {incident.diagnosed.event.action.rstrip('.')}.",
                (incident.diagnosed.line,),
            )
        )
    if incident.killed:
        count = incident.killed.event.killed
        alive = f"; {many(count, 'rank')} still alive had to be killed" if count else ""
        sentences.append(
            Sentence(f"All ranks of the generation were ended{alive}.", (incident.killed.line,))
        )
    for failed in incident.failed_nodes:
        sentences.append(
            Sentence(f"{failed.event.node} was taken out and is not used again.", (failed.line,))
        )
    for promoted in incident.promoted:
        sentences.append(
            Sentence(
                f"{promoted.event.node} took the place of {promoted.event.replaces}.",
                (promoted.line,),
            )
        )
    for rejected in incident.rejected:
        text = (
            f"The {TIERS[tier_of(rejected.event.path)]} {rejected.event.path} did not verify "
            f"({rejected.event.why}); "
            "an older one was looked for."
        )
        sentences.append(Sentence(text, (rejected.line,)))
    for restart in incident.restarts:
        event = restart.event
        source = "the initial weights"
        if event.checkpoint:
            tier = TIERS[tier_of(event.checkpoint)]
            source = f"the {tier} of step {restart.step or 0:,} ({event.checkpoint})"
        sentences.append(
            Sentence(
                f"{clock(restart.time, shown)}: attempt {restart.entry.attempt} was started on "
                f"{listed(event.nodes)} "
                f"from {source}.",
                (restart.line,),
            )
        )
        shown = restart.time
    return tuple(sentences) or (Sentence("Nothing yet."),)


def _cost(incident: IncidentRecord, story: Story) -> tuple[Sentence, ...]:
    if incident.closed is None:
        return (Sentence("Not known yet: it was not over when the journal was last written."),)
    event, line = incident.closed.event, (incident.closed.line,)
    tokens = event.steps_lost * (story.created.event.tokens_per_step if story.created else 0)
    lost = f"{many(event.steps_lost, 'step')}{f' ({tokens:,} tokens)' if tokens else ''}"
    if event.outcome != "recovered":
        work = (Sentence(f"The work of {lost} was lost.", line),) if event.steps_lost else ()
        return (*work, Sentence(_time_until_the_end(incident.closed), line))
    again = "No step had to be done again."
    if event.steps_lost:
        again = f"{lost} had to be done again."
    return (
        Sentence(again, line),
        Sentence(
            f"{duration(event.seconds_lost)} from the failure until training was back where it "
            "had been; "
            f"{duration(event.down_seconds)} of them without any training.",
            line,
        ),
    )


def _time_until_the_end(closed: Recorded[IncidentClosed]) -> str:
    event = closed.event
    end = f"the run {event.outcome if event.outcome in ('stopped', 'halted') else 'ended'}"
    if event.down_seconds < event.seconds_lost:
        return (
            f"Training went on after {duration(event.down_seconds)}, but was not yet back where "
            "it had been "
            f"{duration(event.seconds_lost)} after the failure, when {end}."
        )
    return f"Training did not go on; {duration(event.seconds_lost)} until {end}."


def _outcome(incident: IncidentRecord, story: Story) -> tuple[Sentence, ...]:
    if incident.closed is None:
        return (Sentence("Open when the journal was last written."),)
    line = (incident.closed.line,)
    outcome = incident.closed.event.outcome
    if outcome == "recovered":
        attempt = incident.closed.entry.attempt
        place = f" in attempt {attempt}" if attempt else ""
        return (Sentence(f"Recovered: training went on{place}.", line),)
    if outcome == "halted":
        for entry in story.reading.entries:
            # A run may halt more than once: the halt that closed this incident is the first behind
            # it.
            if entry.seq > incident.closed.line and isinstance(entry.event, RunHalted):
                question = sentence(entry.event.question)
                return (Sentence(f"Halted; a person must decide: {question}", (*line, entry.seq)),)
    return (
        Sentence(
            f"The run {outcome}." if outcome in ("stopped", "halted") else sentence(outcome), line
        ),
    )
