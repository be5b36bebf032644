"""Sentences about one attempt, and about the lines of the journal that belong to no incident."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from opt_logbook.record import events as kinds
from opt_logbook.record import node_events, stability_events
from opt_logbook.record.codec import to_json_value
from opt_logbook.record.events import Entry
from opt_logbook.record.run_directory import tier_of
from opt_logbook.story.format import (
    CAUSES,
    TIERS,
    byte_size,
    clock,
    duration,
    listed,
    listed_briefly,
    many,
    perplexity_on,
    sentence,
)
from opt_logbook.story.records import AttemptRecord, Recorded, by_set
from opt_logbook.story.sentences import Sentence

_SHOWN_ELSEWHERE = (
    kinds.RunCreated,
    kinds.AttemptStarted,
    kinds.TrainingBegan,
    kinds.CheckpointCommitted,
    kinds.CheckpointRetired,
    kinds.ValidationMeasured,
    kinds.AttemptEnded,
    kinds.FailureSeen,
    kinds.IncidentDiagnosed,
    kinds.IncidentClosed,
)
"""Kinds that stand in the attempt's own sentences, in an incident or at the top of the page."""

VALUES_CHARACTERS_MAX = 400
"""Of values whose shape is not known; what is longer is cut."""


def describe_attempt(attempt: AttemptRecord) -> tuple[Sentence, ...]:
    """The attempt from its start to its end; notes stand where they were made."""
    return (
        *_start(attempt),
        *describe_entries(attempt.entries, attempt.since),
        *_checkpoints([one for one in attempt.saved if one.event.tier == "shared"]),
        *_snapshots(attempt.saved, "memory", "held in the nodes' memory"),
        *_snapshots(attempt.saved, "node", "copied to the nodes' own disks"),
        *_validations(attempt.validated),
        *_retirements(attempt.entries),
        *_end(attempt),
    )


def describe_before(entries: Iterable[Entry]) -> tuple[Sentence, ...]:
    """What was journalled before the first attempt."""
    return tuple(describe_entries(entries, None))


def describe_entries(entries: Iterable[Entry], shown: float | None) -> list[Sentence]:
    """Lines that have a sentence of their own, in order. `shown` is the time that the reader saw
    last."""
    sentences: list[Sentence] = []
    for entry in entries:
        if isinstance(entry.event, kinds.Note):
            author = f"{entry.event.author}, {clock(entry.time, shown)}"
            sentences.append(Sentence(entry.event.text, (entry.seq,), author=author))
            shown = entry.time
        elif not isinstance(entry.event, _SHOWN_ELSEWHERE):
            text = _sentence_of(entry)
            if text:
                sentences.append(Sentence(f"{clock(entry.time, shown)}: {text}", (entry.seq,)))
                shown = entry.time
    return sentences


def _start(attempt: AttemptRecord) -> list[Sentence]:
    sentences: list[Sentence] = []
    if attempt.started:
        event, line = attempt.started.event, (attempt.started.line,)
        standby = "no node stood by"
        if event.buffer:
            standby = f"{listed_briefly(event.buffer)} stood by"
        ranks = many(event.world_size, "rank")
        sentences.append(
            Sentence(f"Ran on {listed_briefly(event.nodes)} with {ranks}; {standby}.", line)
        )
        if event.difference:
            sentences.append(Sentence(f"Configuration changed: {listed(event.difference)}.", line))
    if attempt.began:
        text = f"The first step was done {duration(attempt.began.event.seconds)} after the start."
        sentences.append(Sentence(text, (attempt.began.line,)))
    elif attempt.started and attempt.last_step is None:
        sentences.append(Sentence("No step of it was done."))
    return sentences


def _checkpoints(saved: list[Recorded[kinds.CheckpointCommitted]]) -> list[Sentence]:
    if not saved:
        return []
    slowest = max(one.event.seconds for one in saved)
    size = byte_size(saved[-1].event.bytes)
    where = "step" if len(saved) == 1 else "steps"
    text = (
        f"{many(len(saved), 'checkpoint')} of {size} saved, at {where} {_steps(saved)}; the "
        f"slowest took {duration(slowest)}."
    )
    sentences = [Sentence(text, _lines(saved))]
    ill = [one for one in saved if not one.event.healthy]
    if ill:
        were_saved = "step {} was saved" if len(ill) == 1 else "steps {} were saved"
        text = f"Training was not well when {were_saved.format(_steps(ill))}."
        sentences.append(Sentence(text, _lines(ill)))
    return sentences


def _snapshots(
    saved: list[Recorded[kinds.CheckpointCommitted]], tier: str, where: str
) -> list[Sentence]:
    snapshots = [one for one in saved if one.event.tier == tier]
    if not snapshots:
        return []
    # One line, since each snapshot replaces an older one and they come every few steps.
    newest = snapshots[-1]
    text = (
        f"{many(len(snapshots), 'snapshot')} of {byte_size(newest.event.bytes)} {where}, "
        f"the newest at step {newest.step or 0:,}."
    )
    return [Sentence(text, (newest.line,))]


def _validations(validated: list[Recorded[kinds.ValidationMeasured]]) -> list[Sentence]:
    sentences: list[Sentence] = []
    for name, measured in by_set(validated).items():
        points = listed_briefly(
            f"{one.event.perplexity:.1f} at step {one.step or 0:,}" for one in measured
        )
        colon = "" if name == kinds.HELD_OUT else ":"
        sentences.append(Sentence(f"{perplexity_on(name)}{colon} {points}.", _lines(measured)))
    return sentences


def _retirements(entries: list[Entry]) -> list[Sentence]:
    # Snapshots come and go every few steps; only what left the run directory is news.
    retired = tuple(
        entry.seq
        for entry in entries
        if isinstance(entry.event, kinds.CheckpointRetired)
        and tier_of(entry.event.path) == "shared"
    )
    if not retired:
        return []
    text = f"{many(len(retired), 'older checkpoint')} removed by the retention rule."
    return [Sentence(text, retired)]


def _end(attempt: AttemptRecord) -> list[Sentence]:
    if attempt.ended is None:
        return []
    after = ""
    if attempt.ended.step is not None:
        after = f" after step {attempt.ended.step:,}"
    text = f"It ended{after}: {attempt.ended.event.outcome}."
    return [Sentence(text, (attempt.ended.line,))]


def _steps(saved: list[Recorded[kinds.CheckpointCommitted]]) -> str:
    return listed_briefly(f"{one.step:,}" for one in saved if one.step is not None)


def _lines(recorded: Iterable[Recorded[Any]]) -> tuple[int, ...]:
    return tuple(one.line for one in recorded)


def _sentence_of(entry: Entry) -> str:  # noqa: PLR0912, PLR0915  a table, one line a kind
    """The sentence for the line, without its time; empty where an incident has it."""
    match entry.event:
        case kinds.LineageOpened(lineage=lineage, difference=difference):
            changes = f", changing {listed(difference)}" if difference else ""
            return f"lineage {lineage} was opened{changes}."
        case kinds.SupervisorStarted(host=host, pid=pid, version=version, resumed=resumed) as began:
            again = "took over the run where the journal left it" if resumed else "began the run"
            differs = began.code_difference
            own = f", with code that is not the lineage's ({listed(differs)})" if differs else ""
            return f"a supervisor (version {version}, process {pid} on {host}) {again}{own}."
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
        case kinds.NodePromoted(node=node, replaces=replaces) if node == replaces:
            return f"{node} trained again, in the place it had."
        case kinds.NodePromoted(incident=0, node=node, replaces=replaces):
            return f"{node} took the place of {replaces}."
        case kinds.NodeFailed() | kinds.GenerationKilled() | kinds.NodePromoted():
            return ""
        case kinds.FindingNoted(node=node, cause=cause, detail=detail, response=response):
            what = f"{CAUSES.get(cause, cause)} ({detail or cause})"
            seen = f", {entry.event.evidence[0].text}" if entry.event.evidence else ""
            return f"a finding on {node}: {what}{seen}: {sentence(response)}"
        case kinds.PlaceVacated(node=node, nodes=count):
            return (
                f"no buffer node was left for the place of {node}: the run went on with "
                f"{many(count, 'node')} at the same global batch."
            )
        case node_events.GrowthBegan(nodes=nodes):
            return (
                f"all ranks were ended to go on with {listed_briefly(nodes)} too; nothing failed."
            )
        case node_events.LemonNoted(node=node, why=why):
            return f"{node} is a repeat offender: {sentence(why)}"
        case node_events.LemonCleared(node=node):
            return f"{node} is no repeat offender any more."
        case node_events.LemonPassedOver(node=node, by=other):
            return f"{node}, a repeat offender, was passed over: {other} took its place."
        case node_events.NodeReturned(node=node, tests=tests):
            return f"{node} passed its preflight ({many(tests, 'test')}) and stood by again."
        case node_events.ActionWithheld(response=response):
            return sentence(response)
        case node_events.ReplacementBegan(node=node):
            return f"all ranks are ended to take {node} out; nothing has failed."
        case stability_events.InstabilitySeen(number=number, what=what, response=response):
            return f"instability {number}: {what}; {response}."
        case stability_events.InstabilityClosed(number=number, outcome=outcome, what=what):
            judged = "what was done about it has helped" if outcome == "helped" else outcome
            return f"instability {number}, {judged}: {what}."
        case stability_events.DataProbed(what=what) | stability_events.ReplayCompared(what=what):
            return f"{what}."
        case stability_events.BatchSources() as read:
            return _sources(read, entry.step or 0)
        case stability_events.RollbackBegan(order=order):
            return f"all ranks are ended to go back as order {order} wants it; nothing has failed."
        case kinds.InForceReported(values=values, environment_difference=differs):
            changed = f" What ranks talk by has changed: {'; '.join(differs)}." if differs else ""
            return (
                "the values in force were read back from the ranks and are as they should be: "
                f"{_pairs(values)}.{changed}"
            )
        case kinds.OrderGiven(number=number, order=order, reason=reason, parameters=values):
            return f"order {number}, {_in_words(order, values)}: {sentence(reason)}"
        case kinds.OrderEnded(number=number, outcome=outcome):
            before = f" before step {entry.step:,}" if entry.step is not None else ""
            return f"order {number} was {outcome}{before}."
        case kinds.CheckpointRejected(path=path, why=why):
            return (
                f"the {TIERS[tier_of(path)]} {path} did not verify ({why}); an older one was "
                "looked for."
            )
        case kinds.SaveAbandoned(path=path, why=why):
            return f"the save of {path} was abandoned: {sentence(why)}"
        case kinds.JournalRepaired(bytes_removed=count):
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
            state = f"saved at step {saved:,}" if saved >= 0 else "nothing was saved"
            return f"the run was stopped by {by}; {state}."
        case kinds.HoldBegan(by=by, reason=reason):
            why = f": {sentence(reason)}" if reason else "."
            return f"{by} put a hold on the run, to train no more until it is resumed{why}"
        case kinds.HoldEnded(by=by):
            return f"{by} took the hold back."
        case kinds.RunHalted(question=question, cause=cause):
            return f"the run halted ({cause}); a person must decide: {sentence(question)}"
        case kinds.RunFinished(tokens=tokens, seconds=seconds):
            return f"the run finished: {many(tokens, 'token')} in {duration(seconds)}."
        case kinds.Unknown(name=name, fields=fields):
            return f"{name} (a kind that this version does not know): {_pairs(fields)}."
        # A kind without a sentence of its own is shown all the same: no line may go unseen.
        case other:
            return f"{other.kind}: {_pairs(to_json_value(other))}."


def _sources(read: stability_events.BatchSources, step: int) -> str:
    """Which documents the batch of an alarm had."""
    named = [
        f"{known.source or f'document {known.document:,}'} ({known.share:.1%})"
        for known in read.sources
    ]
    if (others := read.documents - len(named)) > 0:
        named.append(f"{many(others, 'more document')}")
    what = f"the batch of step {step:,}, at the alarm {read.alarm}, had"
    return f"{what} {many(read.documents, 'document')}: {listed(named)}."


def _in_words(order: str, values: Mapping[str, Any]) -> str:
    """What an order does, as far as this version knows."""
    match order:
        case "scale_lr":
            return f"the learning rate times {values.get('factor')}"
        case "set_clip":
            return f"gradients clipped to the norm {values.get('clip')}"
        case "set_loss_scale":
            parts = [
                f"the loss scale set to {values['scale']:g}" if values.get("scale") else "",
                f"the loss scale's floor at {values['floor']:g}" if values.get("floor") else "",
            ]
            return " and ".join(part for part in parts if part)
        case "scale_embedding_gradient":
            return f"the embedding's gradient times {values.get('factor')}"
        case "skip_samples":
            after = values.get("after", 0)
            when = f" {many(after, 'step')} later" if after else ""
            return f"the next {many(values.get('samples', 0), 'sample')} left out{when}"
        case "roll_back":
            text = f"back to step {values.get('step', 0):,}"
            changes = values.get("changes") or ()
            others = (
                _in_words(str(change.get("kind", "")), change)
                for change in changes
                if isinstance(change, Mapping)
            )
            return ", with ".join([text, *others])
    return f"{order} {_pairs(values)}".strip()


def _pairs(values: Any) -> str:
    """Values of unknown shape as `key value`, at most `VALUES_CHARACTERS_MAX`."""
    pairs = (
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    )
    text = ", ".join(pairs)
    if len(text) <= VALUES_CHARACTERS_MAX:
        return text
    return text[:VALUES_CHARACTERS_MAX] + "…"
