"""One attempt as the chronicle tells it, and the lines of the journal that belong to no
incident."""

import json
from collections.abc import Iterable
from typing import Any

from opt_logbook.record import events as kinds
from opt_logbook.record.codec import to_json_value
from opt_logbook.record.events import Entry
from opt_logbook.record.run_directory import tier_of
from opt_logbook.story.format import (
    TIERS,
    bytes_in_words,
    clock,
    duration,
    listed,
    listed_briefly,
    many,
    perplexity_on,
    sentence,
)
from opt_logbook.story.incidents import Attempt, Recorded, by_set
from opt_logbook.story.sentences import Sentence

_TOLD_ELSEWHERE = (
    kinds.RunCreated,
    kinds.AttemptStarted,
    kinds.TrainingBegan,
    kinds.CheckpointCommitted,
    kinds.CheckpointRetired,
    kinds.ValidationMeasured,
    kinds.AttemptEnded,
    kinds.FailureSeen,
    kinds.IncidentDiagnosed,
    kinds.NodePromoted,
    kinds.IncidentClosed,
)
"""Kinds that the attempt's own sentences, an incident or the top of the page tell."""


def attempt_sentences(attempt: Attempt) -> tuple[Sentence, ...]:
    """The attempt from its start to its end; notes stand where they were made."""
    said: list[Sentence] = []
    if attempt.started:
        event = attempt.started.event
        spare = (
            f"; {listed_briefly(event.buffer)} stood by" if event.buffer else "; no node stood by"
        )
        ranks = many(event.world_size, "rank")
        said.append(
            Sentence(
                f"Ran on {listed_briefly(event.nodes)} with {ranks}{spare}.",
                (attempt.started.line,),
            )
        )
        if event.difference:
            said.append(
                Sentence(
                    f"Configuration changed: {listed(event.difference)}.", (attempt.started.line,)
                )
            )
    if attempt.began:
        text = f"The first step was done {duration(attempt.began.event.seconds)} after the start."
        said.append(Sentence(text, (attempt.began.line,)))
    elif attempt.started and attempt.last_step is None:
        said.append(Sentence("No step of it was done."))
    said += tell_entries(attempt.entries, attempt.since)
    said += _saved([told for told in attempt.saved if told.event.tier == "shared"])
    said += _held(attempt.saved, "memory", "held in the nodes' memory")
    said += _held(attempt.saved, "node", "copied to the nodes' own disks")
    said += _validated(attempt.validated)
    retired = [
        entry.seq
        for entry in attempt.entries
        if isinstance(entry.event, kinds.CheckpointRetired)
        and tier_of(entry.event.path) == "shared"
    ]
    if retired:
        said.append(
            Sentence(
                f"{many(len(retired), 'older checkpoint')} removed by the retention rule.",
                tuple(retired),
            )
        )
    if attempt.ended:
        step = f" after step {attempt.ended.step:,}" if attempt.ended.step is not None else ""
        said.append(
            Sentence(f"It ended{step}: {attempt.ended.event.outcome}.", (attempt.ended.line,))
        )
    return tuple(said)


def tell_before(entries: Iterable[Entry]) -> tuple[Sentence, ...]:
    """What was journalled before the first attempt."""
    return tuple(tell_entries(entries, None))


def tell_entries(entries: Iterable[Entry], shown: float | None) -> list[Sentence]:
    """Lines that have a sentence of their own, in order. `shown` is the time that the reader saw
    last."""
    said: list[Sentence] = []
    for entry in entries:
        if isinstance(entry.event, kinds.Note):
            author = f"{entry.event.author}, {clock(entry.time, shown)}"
            said.append(Sentence(entry.event.text, (entry.seq,), author=author))
            shown = entry.time
        elif not isinstance(entry.event, _TOLD_ELSEWHERE):
            text = _sentence_of(entry)
            if text:
                said.append(Sentence(f"{clock(entry.time, shown)}: {text}", (entry.seq,)))
                shown = entry.time
    return said


def _saved(saved: list[Recorded[kinds.CheckpointCommitted]]) -> list[Sentence]:
    if not saved:
        return []
    steps = listed_briefly(f"{told.step:,}" for told in saved if told.step is not None)
    slowest = max(told.event.seconds for told in saved)
    size = bytes_in_words(saved[-1].event.bytes)
    where = "step" if len(saved) == 1 else "steps"
    text = (
        f"{many(len(saved), 'checkpoint')} of {size} saved, at {where} {steps}; the slowest "
        f"took {duration(slowest)}."
    )
    said = [Sentence(text, tuple(told.line for told in saved))]
    ill = [told for told in saved if not told.event.healthy]
    if ill:
        steps = listed_briefly(f"{told.step:,}" for told in ill if told.step is not None)
        saved_then = f"step {steps} was saved" if len(ill) == 1 else f"steps {steps} were saved"
        said.append(
            Sentence(f"Training was not well when {saved_then}.", tuple(told.line for told in ill))
        )
    return said


def _held(
    saved: list[Recorded[kinds.CheckpointCommitted]], tier: str, where: str
) -> list[Sentence]:
    held = [told for told in saved if told.event.tier == tier]
    if not held:
        return []
    newest, size = held[-1], bytes_in_words(held[-1].event.bytes)
    text = (
        f"{many(len(held), 'snapshot')} of {size} {where}, the newest at step {newest.step or 0:,}."
    )
    return [Sentence(text, (newest.line,))]


def _validated(validated: list[Recorded[kinds.ValidationMeasured]]) -> list[Sentence]:
    said: list[Sentence] = []
    for name, measured in by_set(validated).items():
        points = listed_briefly(
            f"{told.event.perplexity:.1f} at step {told.step or 0:,}" for told in measured
        )
        colon = "" if name == kinds.HELD_OUT else ":"
        said.append(
            Sentence(
                f"{perplexity_on(name)}{colon} {points}.", tuple(told.line for told in measured)
            )
        )
    return said


def _sentence_of(entry: Entry) -> str:  # noqa: PLR0912  a table, one line a kind
    """What the line says, in words; empty where an incident tells it."""
    match entry.event:
        case kinds.LineageOpened(lineage=lineage, difference=difference):
            changes = f", changing {listed(difference)}" if difference else ""
            return f"lineage {lineage} was opened{changes}."
        case kinds.SupervisorStarted(host=host, pid=pid, version=version, resumed=resumed):
            again = "took over the run where the journal left it" if resumed else "began the run"
            return f"a supervisor (version {version}, process {pid} on {host}) {again}."
        case kinds.AgentsAdopted(generation=generation, nodes=nodes):
            return (
                f"generation {generation} was found training on {listed_briefly(nodes)} and "
                "was let go on."
            )
        case kinds.NodeJoined(node=node, role=role, slots=slots):
            task = "to stand by" if role == "buffer" else "to train"
            return f"{node} joined {task}, with {many(slots, 'rank slot')}."
        case kinds.NodeFailed(incident=0, node=node, cause=cause):
            return f"{node} was taken out ({cause})."
        case kinds.GenerationKilled(incident=0, killed=killed):
            return f"all ranks were ended, {killed} of them by force."
        case kinds.NodeFailed() | kinds.GenerationKilled():
            return ""
        case kinds.InForceReported(values=values):
            return (
                "the values in force were read back from the ranks and are as they should be: "
                f"{_plainly(values)}."
            )
        case kinds.OrderGiven(number=number, order=order, reason=reason):
            return f"order {number}, {order}: {sentence(reason)}"
        case kinds.OrderEnded(number=number, outcome=outcome):
            return (
                f"order {number} was "
                f"{outcome}{f' before step {entry.step:,}' if entry.step is not None else ''}."
            )
        case kinds.CheckpointRejected(path=path, why=why):
            return (
                f"the {TIERS[tier_of(path)]} {path} did not verify ({why}); an older one was "
                "looked for."
            )
        case kinds.SaveAbandoned(path=path, why=why):
            return f"the save of {path} was abandoned: {sentence(why)}"
        case kinds.JournalMended(bytes_removed=count):
            verb = "was" if count == 1 else "were"
            return (
                f"the journal's last line had been torn by a crash; {many(count, 'byte')} "
                f"{verb} cut off."
            )
        case kinds.JournalDamaged(line=line, why=why):
            return f"line {line} of the journal was found damaged: {sentence(why)}"
        case kinds.JournalStalled(seconds=seconds):
            return (
                f"the file system kept the journal waiting for {duration(seconds)}; training "
                "went on."
            )
        case kinds.MetricsDropped(rank=rank, count=count):
            return f"rank {rank} dropped {many(count, 'metrics line')} rather than wait."
        case kinds.RunStopped(by=by, saved_step=saved):
            return f"the run was stopped by {by}; " + (
                f"saved at step {saved:,}." if saved >= 0 else "nothing was saved."
            )
        case kinds.RunHalted(question=question, cause=cause):
            return f"the run halted ({cause}); a person must decide: {sentence(question)}"
        case kinds.RunFinished(tokens=tokens, seconds=seconds):
            return f"the run finished: {many(tokens, 'token')} in {duration(seconds)}."
        case kinds.Unknown(name=name, fields=fields):
            return f"{name} (a kind that this version does not know): {_plainly(fields)}."
        case other:
            return f"{other.kind}: {_plainly(to_json_value(other))}."


def _plainly(values: Any) -> str:
    """Values of unknown shape as `key value`, at most a few hundred characters."""
    pairs = (
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    )
    text = ", ".join(pairs)
    return text if len(text) <= 400 else text[:400] + "…"
