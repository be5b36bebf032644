"""The top of the chronicle: what happened, in a few paragraphs for somebody who has not seen the
code."""

from opt_logbook.record.events import (
    JournalDamaged,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SupervisorStarted,
)
from opt_logbook.story.format import CAUSES, clock, duration, listed, many, moment, sentence, short
from opt_logbook.story.instabilities import describe_instabilities
from opt_logbook.story.records import IncidentRecord, Recorded, Story
from opt_logbook.story.sentences import Sentence

INCIDENTS_SHOWN_ONE_BY_ONE = 6
"""More than these are counted by cause in the summary; below, each has its own entry anyway."""


def summarize(story: Story) -> tuple[tuple[Sentence, ...], ...]:
    """Paragraphs: what ran and how it ended, what broke, what it cost."""
    if not story.reading.entries:
        return ((Sentence("The journal has no entries yet: there is nothing to tell."),),)
    unstable = describe_instabilities(story, _end_time(story))
    paragraphs = [_what_ran(story), *_what_broke(story), *unstable, _what_it_cost(story)]
    return tuple(tuple(sentences) for sentences in paragraphs if sentences)


def _what_ran(story: Story) -> list[Sentence]:
    sentences: list[Sentence] = []
    if story.created:
        event = story.created.event
        on = f" on {event.data}" if event.data else ""
        sentences.append(
            Sentence(
                f"The run {event.name} set out at {moment(story.created.time)} to train "
                f"{event.model}, a model of "
                f"{short(event.parameters)} parameters,{on} for {many(event.steps, 'step')} of "
                f"{many(event.tokens_per_step, 'token')}.",
                (story.created.line,),
            )
        )
    if story.created and story.created.event.ledger_of:
        sentences.append(_whose_ledger(story.created))
    if story.created and story.aimed:
        lineage = story.aimed.event.lineage
        sentences.append(
            Sentence(
                f"Lineage {lineage} made that {many(story.steps, 'step')}.", (story.aimed.line,)
            )
        )
    begun = story.created.time if story.created else None
    match story.end.event if story.end else None:
        case RunFinished() as end if story.end:
            unigram = story.created.event.unigram_perplexity if story.created else 0.0
            bar = f", against {unigram:.1f} for a unigram model of the same data" if unigram else ""
            text = (
                f"It finished after {duration(end.seconds)}, at {clock(story.end.time, begun)}, "
                "with a training loss "
                f"of {end.loss:.3f} nats a token and a validation perplexity of "
                f"{end.validation_perplexity:.1f}{bar}."
            )
            sentences.append(Sentence(text, end_lines(story)))
        case RunStopped(by=by, saved_step=saved):
            state = "nothing had been saved yet"
            if saved >= 0:
                state = f"its state is saved at step {saved:,}"
            sentences.append(
                Sentence(
                    f"It was stopped by {by} at {moment(_end_time(story))}; {state}.",
                    end_lines(story),
                )
            )
        case RunHalted(question=question, cause=cause):
            sentences.append(
                Sentence(
                    f"It halted at {moment(_end_time(story))} because of {cause}, and a person "
                    "must decide: "
                    f"{sentence(question)}",
                    end_lines(story),
                )
            )
        case _:
            at = "no attempt had begun"
            if story.attempts:
                at = f"attempt {story.attempts[-1].name} was at step {story.totals.steps:,}"
            text = (
                f"The journal has no end: when it was last written, at {moment(story.now)}, {at}. "
                "The run was going on "
                "then, or its supervisor had died."
            )
            sentences.append(Sentence(text, (story.reading.entries[-1].seq,)))
    return sentences


def _whose_ledger(created: Recorded[RunCreated]) -> Sentence:
    event = created.event
    first = min((int(known.get("step", 0)) for known in event.ledger), default=0)
    orders = f"{many(len(event.ledger), 'order')}, the first behind step {first:,}"
    if not event.ledger:
        orders = "no order"
    alike = "What decides its weights is as it was there."
    if event.ledger_difference:
        alike = f"Its weights are others all the same: {listed(event.ledger_difference)}."
    text = f"It trains under the ledger of {event.ledger_of} from the start: {orders}. {alike}"
    return Sentence(text, (created.line,))


def _what_broke(story: Story) -> list[list[Sentence]]:
    incidents = story.incidents
    if not incidents:
        return [[Sentence("Nothing broke.")]] if story.attempts else []
    if len(incidents) > INCIDENTS_SHOWN_ONE_BY_ONE:
        return [_counted(incidents)]
    opening = Sentence(
        "One thing broke on the way."
        if len(incidents) == 1
        else f"{_number_name(len(incidents))} things broke on the way."
    )
    return [[opening], *(_in_brief(incident, _end_time(story)) for incident in incidents)]


def _counted(incidents: list[IncidentRecord]) -> list[Sentence]:
    by_cause: dict[str, list[IncidentRecord]] = {}
    for incident in incidents:
        cause = incident.diagnosed.event.cause if incident.diagnosed else "not diagnosed"
        by_cause.setdefault(cause, []).append(incident)
    order = sorted(by_cause, key=lambda cause: (-len(by_cause[cause]), cause))
    sentences = [Sentence(f"{many(len(incidents), 'thing')} broke on the way.")]
    for cause in order:
        lines = tuple(i.diagnosed.line for i in by_cause[cause] if i.diagnosed)
        meaning = f" ({CAUSES[cause]})" if cause in CAUSES else ""
        sentences.append(Sentence(f"{many(len(by_cause[cause]), 'time')} {cause}{meaning}.", lines))
    return sentences


def _in_brief(incident: IncidentRecord, shown: float) -> list[Sentence]:
    """What broke, when, why, what was done, what it cost: a few sentences for somebody who has not
    seen the code.

    `shown` is the time that the reader saw last.
    """
    sentences: list[Sentence] = []
    if incident.seen:
        seen = incident.seen[0]
        after = f", after step {seen.step:,}" if seen.step is not None else ""
        sentences.append(
            Sentence(
                f"At {clock(seen.time, shown)}{after}: {sentence(seen.event.what)}", (seen.line,)
            )
        )
    if incident.diagnosed:
        event = incident.diagnosed.event
        meaning = CAUSES.get(event.cause, event.cause)
        blame = f" Blame: {event.blame}." if event.blame not in ("", "none") else ""
        sentences.append(
            Sentence(f"The cause: {meaning} ({event.cause}).{blame}", (incident.diagnosed.line,))
        )
    for promoted in incident.promoted:
        sentences.append(
            Sentence(
                f"{promoted.event.node} took the place of {promoted.event.replaces}.",
                (promoted.line,),
            )
        )
    for restart in incident.restarts[-1:]:
        sentences.append(
            Sentence(
                f"Training was started again from step {restart.step or 0:,} as attempt "
                f"{restart.entry.attempt}.",
                (restart.line,),
            )
        )
    if incident.closed:
        event_ = incident.closed.event
        if event_.outcome == "recovered":
            verb = "was" if event_.steps_lost == 1 else "were"
            steps = "no step"
            if event_.steps_lost:
                steps = f"{many(event_.steps_lost, 'step')}, which {verb} done again,"
            sentences.append(
                Sentence(
                    f"It cost {steps} and {duration(event_.seconds_lost)}, of which "
                    f"{duration(event_.down_seconds)} without training.",
                    (incident.closed.line,),
                )
            )
        else:
            sentences.append(
                Sentence(f"It ended with the run {event_.outcome}.", (incident.closed.line,))
            )
    else:
        sentences.append(Sentence("It was not over when the journal was last written."))
    return sentences


def _what_it_cost(story: Story) -> list[Sentence]:
    totals = story.totals
    if totals.effective_ratio is None or not totals.kept:
        return []
    sentences = [
        Sentence(
            f"Of {duration(totals.wall)} in all, {totals.effective_ratio:.0%} went into training "
            "steps whose work was "
            f"kept ({duration(totals.kept)})."
        )
    ]
    recovered = [incident.closed for incident in story.incidents if incident.closed]
    unattended = all(closed.event.outcome == "recovered" for closed in recovered)
    if (
        recovered
        and unattended
        and len(recovered) == len(story.incidents)
        and _finished_unattended(story)
    ):
        sentences.append(
            Sentence(
                "The supervisor recovered from all of it; nobody had to act.",
                tuple(c.line for c in recovered),
            )
        )
    return sentences


def _finished_unattended(story: Story) -> bool:
    """Whether the run finished under its first supervisor: each further one somebody had to
    start."""
    events = [entry.event for entry in story.reading.entries]
    acted = any(isinstance(event, (RunStopped, RunHalted, JournalDamaged)) for event in events)
    supervisors = sum(isinstance(event, SupervisorStarted) for event in events)
    # Damage may hide a stop or another supervisor, so nothing is claimed then.
    whole = not story.reading.damaged and not story.reading.torn_bytes
    finished = story.end is not None and isinstance(story.end.event, RunFinished)
    return finished and supervisors == 1 and whole and not acted


def end_lines(story: Story) -> tuple[int, ...]:
    """The journal line that tells the run's end, where there is one."""
    return (story.end.line,) if story.end else ()


def _end_time(story: Story) -> float:
    return story.end.time if story.end else story.now


def _number_name(number: int) -> str:
    return {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}.get(number, str(number))
