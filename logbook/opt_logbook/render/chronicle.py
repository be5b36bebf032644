"""What the chronicle says: the run's story as plain sentences, each with the journal lines it rests
on.

Nothing here knows HTML or Markdown; `page` and `markdown` render the same `Chronicle`. The
structure is that of the OPT-175B logbook (metaseq `projects/OPT/chronicles`): newest first, one
dated heading per attempt that says where it was restarted from and why.
"""

import math
import re
from dataclasses import dataclass, replace

from opt_logbook.record import metrics
from opt_logbook.record.events import HELD_OUT, RunFinished, RunHalted, RunStopped
from opt_logbook.story.attempt import describe_attempt, describe_before
from opt_logbook.story.format import (
    duration,
    listed,
    listed_briefly,
    many,
    moment,
    perplexity_on,
    sentence,
    short,
)
from opt_logbook.story.incident import IncidentStory, describe_incident, place_of
from opt_logbook.story.records import AttemptRecord, Story, by_set
from opt_logbook.story.sentences import Sentence
from opt_logbook.story.summary import end_lines, summarize


@dataclass(frozen=True, slots=True)
class AttemptStory:
    """One entry of the logbook."""

    name: str
    anchor: str
    heading: str
    incidents: tuple[IncidentStory, ...]
    """Those it recovered from: why it was started."""
    sentences: tuple[Sentence, ...]
    contents: tuple[str, str, str, str, str]
    """Its row in the index: begun, attempt, steps, lasted, why it was started."""


@dataclass(frozen=True, slots=True)
class Chronicle:
    """All that page and Markdown show."""

    title: str
    status: str
    """``finished``, ``stopped``, ``halted``, ``open`` (no end in the journal) or ``empty``."""
    status_text: str
    as_of: str
    summary: tuple[tuple[Sentence, ...], ...]
    """Paragraphs."""
    warnings: tuple[Sentence, ...]
    card: tuple[tuple[str, Sentence], ...]
    time_spent: tuple[tuple[str, float, str], ...]
    """(name, seconds, what it is), summing to the wall clock."""
    open_incidents: tuple[IncidentStory, ...]
    """Incidents that no attempt has followed yet."""
    entries: tuple[AttemptStory, ...]
    """Newest first."""
    before: tuple[Sentence, ...]
    journal_lines: dict[int, str]
    """The journal's own words for every line that is referred to."""


def compose(story: Story, name: str, raw_lines: dict[int, str]) -> Chronicle:
    """The chronicle of a story. `name` is the run's where the journal does not tell; `raw_lines`
    are the journal's."""
    title = story.created.event.name if story.created else name
    status, status_text = _status(story)
    stories = {incident.number: describe_incident(incident, story) for incident in story.incidents}
    placed = {incident.number: place_of(incident, story.attempts) for incident in story.incidents}
    entries = tuple(
        _attempt_story(index, attempt, story, [stories[n] for n in stories if placed[n] == index])
        for index, attempt in reversed(list(enumerate(story.attempts)))
    )
    top = Chronicle(
        title=title,
        status=status,
        status_text=status_text,
        as_of=moment(story.now) if story.now else "",
        summary=summarize(story),
        warnings=_warnings(story),
        card=_card(story, status_text),
        time_spent=_time_spent(story),
        open_incidents=tuple(stories[n] for n in reversed(stories) if placed[n] is None),
        entries=entries,
        before=describe_before(story.before),
        journal_lines={},
    )
    return replace(
        top, journal_lines={n: raw_lines[n] for n in sorted(_referred(top)) if n in raw_lines}
    )


# Entries ------------------------------------------------------------------------------------------


def _attempt_story(
    index: int, attempt: AttemptRecord, story: Story, incidents: list[IncidentStory]
) -> AttemptStory:
    heading = f"{moment(attempt.since)} · attempt {attempt.name}"
    why = origin = ""
    if attempt.started:
        event = attempt.started.event
        origin = (
            f"restarted from step {attempt.from_step:,} of {event.parent}"
            if event.parent
            else "from the initial weights"
        )
        if event.parent and event.checkpoint == "":
            origin = f"restarted from the initial weights, after {event.parent}"
        why = event.reason
    else:
        origin = "its first line is missing from the journal"
    heading += f" · {origin}" + (
        f" · {why}" if why and attempt.started and attempt.started.event.parent else ""
    )
    steps = (
        "none" if attempt.last_step is None else f"{attempt.from_step:,} to {attempt.last_step:,}"
    )
    row = (
        moment(attempt.since),
        attempt.name,
        steps,
        duration(attempt.until - attempt.since),
        why or origin,
    )
    # A name that was tampered with must not end the attribute it stands in; the index keeps two
    # such anchors apart.
    anchor = f"attempt-{re.sub('[^0-9.]', '', attempt.name)}-{index + 1}"
    return AttemptStory(
        attempt.name, anchor, heading, tuple(reversed(incidents)), describe_attempt(attempt), row
    )


# The top of the page ------------------------------------------------------------------------------


def _status(story: Story) -> tuple[str, str]:
    if not story.reading.entries:
        return "empty", "no entries yet"
    match story.end.event if story.end else None:
        case RunFinished():
            return "finished", "finished"
        case RunStopped(by=by):
            return "stopped", f"stopped by {by}"
        case RunHalted():
            return "halted", "halted: a person must decide"
        case _:
            # The journal cannot show whether its writer lives: silence is unknown (invariant 11).
            return "open", "going on or broken off: no end in the journal"


def _warnings(story: Story) -> tuple[Sentence, ...]:
    sentences: list[Sentence] = []
    damaged = [damage.line for damage in story.reading.damaged]
    if damaged:
        lines = "Line" if len(damaged) == 1 else "Lines"
        verb = "does" if len(damaged) == 1 else "do"
        sentences.append(
            Sentence(
                f"{lines} {listed_briefly(damaged)} of the journal {verb} not verify and had to "
                "be left out: what "
                f"{'it' if len(damaged) == 1 else 'they'} told is missing here."
            )
        )
    if story.reading.torn_bytes:
        sentences.append(
            Sentence(
                f"The journal's last line is torn ({many(story.reading.torn_bytes, 'byte')}) and "
                "is left out."
            )
        )
    if story.reading.entries and story.created is None:
        sentences.append(
            Sentence("The journal does not say what this run is: its first line is missing.")
        )
    if story.measured.broken:
        left = "is" if len(story.measured.broken) == 1 else "are"
        sentences.append(
            Sentence(
                f"{many(len(story.measured.broken), 'metrics line')} could not be read and {left} "
                "left out."
            )
        )
    return tuple(sentences)


def _card(story: Story, status_text: str) -> tuple[tuple[str, Sentence], ...]:
    rows: list[tuple[str, Sentence]] = [
        ("Status", Sentence(sentence(status_text), end_lines(story)))
    ]
    totals = story.totals
    if story.created:
        event, line = story.created.event, (story.created.line,)
        rows.append(("Model", Sentence(f"{event.model}, {event.parameters:,} parameters", line)))
        data = [event.data or "unnamed"]
        data += [f"{short(event.train_tokens)} tokens to train on"] if event.train_tokens else []
        data += [f"{short(event.validation_tokens)} held out"] if event.validation_tokens else []
        data += [f"tokenizer {event.tokenizer}"] if event.tokenizer else []
        rows.append(("Data", Sentence(", ".join(data), line)))
        steps = f"{totals.steps:,} of {story.steps:,} steps, {short(totals.tokens)} tokens"
        rows.append(("Trained", Sentence(steps, (story.aimed.line,) if story.aimed else ())))
    rows += _result_rows(story)
    if story.created or story.attempts:
        begin = story.created.time if story.created else story.attempts[0].since
        rows.append(
            (
                "Wall clock",
                Sentence(f"{duration(totals.wall)}, from {moment(begin)} to {moment(story.until)}"),
            )
        )
    # Without metrics nothing is known to be kept, and 0 % would be a claim.
    if totals.effective_ratio is not None and totals.kept:
        rows.append(
            ("Effective training time", Sentence(f"{totals.effective_ratio:.1%} of the wall clock"))
        )
    if story.attempts and story.attempts[-1].started:
        started = story.attempts[-1].started
        nodes = f"{listed_briefly(started.event.nodes)} training"
        nodes += (
            f", {listed_briefly(started.event.buffer)} standing by" if started.event.buffer else ""
        )
        failed = sorted(
            {failed.event.node for incident in story.incidents for failed in incident.failed_nodes}
        )
        nodes += f", {listed_briefly(failed)} out" if failed else ""
        rows.append(("Nodes", Sentence(nodes, (started.line,))))
        restarts = len(story.attempts) - 1
        after = (
            f", after {many(len(story.incidents), 'incident')}"
            if story.incidents and restarts
            else ""
        )
        rows.append(("Restarts", Sentence(f"{restarts or 'none'}{after}")))
    rows += _version_rows(story)
    return tuple(rows)


def _result_rows(story: Story) -> list[tuple[str, Sentence]]:
    rows: list[tuple[str, Sentence]] = []
    losses = [
        (line["step"], loss)
        for line in story.kept
        if (loss := metrics.number_of(line, "loss")) is not None
    ]
    if losses:
        rows.append(
            (
                "Training loss",
                Sentence(f"{losses[-1][1]:.3f} nats a token at step {losses[-1][0]:,}"),
            )
        )
    unigram = story.created.event.unigram_perplexity if story.created else 0.0
    for name, validated in by_set(
        measured for attempt in story.attempts for measured in attempt.validated
    ).items():
        last = validated[-1]
        text = f"{last.event.perplexity:.1f} at step {last.step or 0:,}"
        if name == HELD_OUT and unigram and math.isfinite(last.event.perplexity):
            text += f"; unigram model {unigram:.1f}, so {last.event.perplexity / unigram:.0%} of it"
        rows.append((perplexity_on(name), Sentence(text, (last.line,))))
    return rows


def _version_rows(story: Story) -> list[tuple[str, Sentence]]:
    started = next(
        (attempt.started for attempt in reversed(story.attempts) if attempt.started), None
    )
    if started is None:
        return []
    event = started.event
    parts = [f"{name} {version}" for name, version in sorted(event.packages.items())]
    if event.git_commit:
        parts.append(
            "commit "
            f"{event.git_commit[:12]}{' with uncommitted changes' if event.git_dirty else ''}"
        )
    return [("Software", Sentence(listed(parts), (started.line,)))] if parts else []


def _time_spent(story: Story) -> tuple[tuple[str, float, str], ...]:
    totals = story.totals
    if totals.wall <= 0:
        return ()
    return (
        ("kept", totals.kept, "training steps whose work is in the newest state"),
        ("redone", totals.redone, "training steps that were lost and had to be done again"),
        ("down", totals.down, "from each failure to the first new step"),
        ("other", totals.other, "starting, saving, validating, pauses"),
    )


def _referred(chronicle: Chronicle) -> set[int]:
    sentences = [*chronicle.warnings, *chronicle.before, *(row[1] for row in chronicle.card)]
    sentences += [s for paragraph in chronicle.summary for s in paragraph]
    incidents = list(chronicle.open_incidents)
    for entry in chronicle.entries:
        sentences += entry.sentences
        incidents += entry.incidents
    sentences += [
        s for incident in incidents for section in incident.sections for s in section.sentences
    ]
    return {line for s in sentences for line in s.lines}
