"""What became of a run, from its directory alone; and what that is worth beside its twin's."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from opt_logbook.record import metrics
from opt_logbook.record.events import (
    Entry,
    IncidentDiagnosed,
    RunFinished,
    RunHalted,
    RunStopped,
    ValidationMeasured,
)
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from benchmarks.stability.peers import SkipStep, ZClip
from benchmarks.stability.settings import PEERS, SKIP_STEP, ZCLIP, Family

FIRST_ATTEMPT = "1.00"
DATA_PROBED = "data_probed"
RESTART = "restart"
GIVE_BACK = "give_back"
"""The rung that undoes another."""
TOLERANCE = 0.02
"""Of the twin's validation loss: harmless disturbances alone move it by 1 %."""
FINISHED, STOPPED, HALTED, BROKEN = "finished", "stopped", "halted", "broken"
RESCUED, HANDED_OVER, VAGUE, LOST = "rescued", "handed over", "stopped, vague", "lost"
OUTCOMES = (RESCUED, HANDED_OVER, VAGUE, LOST)
"""`VAGUE`: stopped early, but what is named is not what it was. Counts as lost in the goals."""


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that the supervisor did."""

    step: int
    """The sign's, in batches consumed."""
    alarm: str
    rung: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run, read from its directory."""

    end: str
    """`FINISHED`, `STOPPED` for a person to decide, `HALTED` likewise without a state saved."""
    validation: float | None
    """Nats a token at the end; None: it was stopped before, or is not finite."""
    steps_taken: int
    """Batches that went forward and backward, those trained again counted again."""
    acts: tuple[Act, ...] = ()
    causes: tuple[str, ...] = ()
    """Of incidents: ranks that ended."""
    verdicts: tuple[str, ...] = ()
    """Of probes of the data, where there are such."""
    outcomes: tuple[str, ...] = ()
    """Of instabilities, as the journal judges them."""
    skipped: tuple[tuple[str, int], ...] = ()
    """Attempt and step of what the loop left out although it was finite."""
    overflows: int = 0
    peers_skip: dict[str, int] = field(default_factory=dict)
    """How often each peer would have stepped in on the same curve: SkipStep skipped, ZClip
    clipped; odd batches not counted."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values, for the file that keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, payload: dict[str, Any]) -> "Result":
        """What `to_json` gave."""
        acts = tuple(Act(**act) for act in payload["acts"])
        skipped = tuple((attempt, step) for attempt, step in payload["skipped"])
        several = ("causes", "verdicts", "outcomes")
        tuples = {key: tuple(payload.get(key, ())) for key in several}
        return cls(**{**payload, **tuples, "acts": acts, "skipped": skipped})


def read_run(run: RunDirectory, odd_batches: Iterable[int] = (), seconds: float = 0.0) -> Result:
    """What the run's journal and metrics tell."""
    entries = read(run.journal).entries
    lines = metrics.read(run).lines
    skipped = tuple(
        (str(line["attempt"]), int(line["step"]))
        for line in lines
        if line.get("skipped") and not _is_non_finite(line)
    )
    return Result(
        end=_end(entries),
        validation=_validation(entries),
        steps_taken=len(lines),
        acts=tuple(
            Act(entry.step or 0, entry.event.alarm, str(entry.event.rung))
            for entry in entries
            if isinstance(entry.event, InstabilitySeen)
        ),
        causes=tuple(
            entry.event.cause for entry in entries if isinstance(entry.event, IncidentDiagnosed)
        ),
        # Journals of versions that probe nothing have no such lines.
        verdicts=tuple(
            str(getattr(entry.event, "verdict", ""))
            for entry in entries
            if entry.event.kind == DATA_PROBED
        ),
        outcomes=tuple(
            entry.event.outcome for entry in entries if isinstance(entry.event, InstabilityClosed)
        ),
        skipped=skipped,
        overflows=sum(_is_non_finite(line) for line in lines),
        peers_skip=_peers_skip(lines, {number + 1 for number in odd_batches}),
        seconds=seconds,
    )


def _end(entries: Sequence[Entry]) -> str:
    for entry in reversed(entries):
        match entry.event:
            case RunFinished():
                return FINISHED
            case RunStopped(by=by):
                return STOPPED if "a person must decide" in by else BROKEN
            case RunHalted():
                return HALTED
    return BROKEN


def _validation(entries: Sequence[Entry]) -> float | None:
    """Of the run's last measurement, if it is finished."""
    if _end(entries) != FINISHED:
        return None
    losses = [
        entry.event.loss
        for entry in entries
        if isinstance(entry.event, ValidationMeasured) and entry.event.name == "validation"
    ]
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def _is_non_finite(line: dict[str, Any]) -> bool:
    return any(metrics.is_not_finite(line, key) for key in ("loss", "grad_norm"))


def _peers_skip(lines: Sequence[dict[str, Any]], odd_steps: set[int]) -> dict[str, int]:
    skip_step, zclip = SkipStep(), ZClip()
    counts: Counter[str] = Counter(dict.fromkeys(PEERS, 0))
    for line in lines:
        loss = metrics.number_of(line, "loss")
        norm = metrics.number_of(line, "grad_norm")
        skips = skip_step.skips(
            math.nan if loss is None else loss, math.nan if norm is None else norm
        )
        clips = math.isfinite(zclip.limit(math.nan if norm is None else norm))
        if int(line["step"]) not in odd_steps:
            counts[SKIP_STEP] += skips
            counts[ZCLIP] += clips
    return dict(counts)


# Beside the twin ----------------------------------------------------------------------------------


def excess(result: Result, twin: float) -> float:
    """How much worse than the twin's its validation loss is, as a part of that; infinite where it
    has none."""
    return math.inf if result.validation is None else result.validation / twin - 1


def is_sick(alone: Result, twin: float) -> bool:
    """Whether the run, left alone, ends more than 2 % worse than its twin."""
    return excess(alone, twin) > TOLERANCE


def outcome_of(result: Result, twin: float, family: Family) -> str:
    """One of `OUTCOMES`."""
    if result.end == FINISHED:
        return RESCUED if excess(result, twin) <= TOLERANCE else LOST
    return HANDED_OVER if set(named(result)) & set(family.names) else VAGUE


def named(result: Result) -> tuple[str, ...]:
    """All that the journal calls what is wrong by, in order of kinds."""
    return (*(act.alarm for act in result.acts), *result.verdicts, *result.causes)


def extra_share(result: Result, steps: int) -> float:
    """Batches trained beyond the plan's, as a part of that. A step that the guard leaves out is
    within the plan: its batch has been spent, and is counted apart."""
    return (result.steps_taken - steps) / steps


def delay(result: Result, onset: int) -> int | None:
    """Steps taken in sickness before the sign that was first acted on; None: nothing was done.

    Args:
        onset: the first sick batch, from 0. The metrics count it as `onset` + 1.
    """
    after = [act.step for act in result.acts if act.step > onset]
    return after[0] - onset - 1 if after else None


def false_acts(result: Result, onset: float = math.inf) -> int:
    """Acts before there was anything to act on; of a healthy run all."""
    # Behind the first that was right steps and batches no longer go together.
    early = takewhile(lambda act: act.step <= onset, result.acts)
    return sum(1 for _ in early)


def false_skips(result: Result, onset: float = math.inf, odd_batches: Iterable[int] = ()) -> int:
    """Steps left out before there was a reason to."""
    odd = {number + 1 for number in odd_batches}
    return sum(
        step <= onset and step not in odd
        for attempt, step in result.skipped
        if attempt == FIRST_ATTEMPT or math.isinf(onset)
    )


def rung_that_worked(result: Result, onset: int) -> str:
    """The last act's rung; ``restart`` where ranks have left by themselves and begun again,
    ``guard`` where the loop alone has left something out; empty: nothing was done."""
    rungs = [act.rung for act in result.acts if act.rung != GIVE_BACK]
    if rungs or result.causes:
        return rungs[-1] if rungs else RESTART
    return "guard" if any(step > onset for _, step in result.skipped) else ""
