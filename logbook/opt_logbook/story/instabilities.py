"""Instabilities of training: what was seen, what was done about each, and what came of it."""

from dataclasses import dataclass, field

from opt_logbook.record.events import Entry
from opt_logbook.record.stability_events import (
    DataProbed,
    InstabilityClosed,
    InstabilitySeen,
    ReplayCompared,
)
from opt_logbook.story.format import clock, many
from opt_logbook.story.records import Recorded, Story
from opt_logbook.story.sentences import Sentence


@dataclass(slots=True)
class InstabilityRecord:
    """One of them, from its first alarm until it was judged."""

    number: int
    seen: list[Recorded[InstabilitySeen]] = field(default_factory=list)
    """The first alarm, and each relapse."""
    probed: list[Recorded[DataProbed]] = field(default_factory=list)
    compared: list[Recorded[ReplayCompared]] = field(default_factory=list)
    closed: Recorded[InstabilityClosed] | None = None

    @property
    def outcome(self) -> str:
        return self.closed.event.outcome if self.closed else "not judged yet"


def instabilities_of(story: Story) -> list[InstabilityRecord]:
    """All of the run, in the order of their first alarms."""
    found: dict[int, InstabilityRecord] = {}
    for entry in story.reading.entries:
        _take(found, entry)
    return list(found.values())


def _take(found: dict[int, InstabilityRecord], entry: Entry) -> None:
    open_ones = [record for record in found.values() if record.closed is None]
    match entry.event:
        case InstabilitySeen(number=number) as event:
            record = found.setdefault(number, InstabilityRecord(number))
            record.seen.append(Recorded(entry, event))
        case DataProbed() as event if open_ones:
            open_ones[-1].probed.append(Recorded(entry, event))
        case ReplayCompared() as event if open_ones:
            open_ones[-1].compared.append(Recorded(entry, event))
        # A rate that is known to be needed is said once more of one that was judged before.
        case InstabilityClosed(number=number) as event if number in found:
            found[number].closed = found[number].closed or Recorded(entry, event)
        case _:
            pass


def describe_instabilities(story: Story, shown: float) -> list[list[Sentence]]:
    """A paragraph for each, behind one that counts them; `shown` is the time that the reader saw
    last."""
    records = instabilities_of(story)
    if not records:
        return []
    times = "once" if len(records) == 1 else many(len(records), "time")
    opening = f"Training was unstable {times}, and the supervisor acted."
    return [[Sentence(opening)], *(_describe(record, shown) for record in records)]


def _describe(record: InstabilityRecord, shown: float) -> list[Sentence]:
    sentences = []
    for number, seen in enumerate(record.seen):
        when = f"At {clock(seen.time, shown)}, at step {seen.step or 0:,}"
        again = "again: " if number else ""
        text = f"{when}: {again}{seen.event.what}; what was done: {seen.event.response}."
        sentences.append(Sentence(text, (seen.line,)))
    for probed in record.probed:
        sentences.append(Sentence(f"The data was looked at: {probed.event.what}.", (probed.line,)))
    for compared in record.compared:
        text = f"Trained again: {compared.event.what}."
        sentences.append(Sentence(text, (compared.line,)))
    if record.closed is None:
        return [*sentences, Sentence("What came of it is not known yet.")]
    event = record.closed.event
    judged = "It has helped" if event.outcome == "helped" else f"It was {event.outcome}"
    return [*sentences, Sentence(f"{judged}: {event.what}.", (record.closed.line,))]
