"""What a run's directory says of it: `opt-train status`, `stop`, and the summary at a run's end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_logbook.record import journal, lock, metrics
from opt_logbook.record.events import RunCreated
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.story.fold import fold_story
from opt_logbook.story.records import IncidentRecord, Story

from opt_train.protocol.exits import BadInput
from opt_train.run.fold import fold
from opt_train.run.state import INTERRUPTED, TERMINAL, RunState, Stage


class RunReport:
    """A run as its record tells it now, read without a lock."""

    def __init__(self, run: RunDirectory) -> None:
        """Read the run.

        Raises:
            BadInput: there is none.
        """
        reading = journal.read(run.journal)
        state = RunState()
        for entry in reading.entries:
            state = fold(state, entry)
        if state.created is None and reading.damaged:
            lines = ", ".join(str(damage.line) for damage in reading.damaged)
            raise BadInput(
                f"{run.journal} is damaged (line {lines}) and does not tell what the run is; "
                "restore it from a copy"
            )
        if state.created is None:
            raise BadInput(
                f"{run.path} is no run directory: it has no journal; give one like runs/demo"
            )
        self.run = run
        self.created: RunCreated = state.created
        self.state = state
        self.story: Story = fold_story(reading, metrics.read(run))
        newest: dict[str, Any] = next((line for line in reversed(self.story.measured.lines)), {})
        self.step: int = newest.get("step", 0)
        self.loss = metrics.number_of(newest, "loss")
        self.tokens_per_second = metrics.number_of(newest, "tokens_per_second")
        self.perplexity = state.validation.perplexity if state.validation else None

    @property
    def stage(self) -> str:
        """The stage, or that nobody leads the run though it has not come to its end."""
        if self.state.stage not in TERMINAL and lock.live_holder_of(self.run) is None:
            return INTERRUPTED
        return self.state.stage

    @property
    def message(self) -> str:
        """What a person should know about the stage."""
        if self.stage == INTERRUPTED:
            return "nobody leads it; the command that started it goes on from the last checkpoint"
        match self.stage:
            case Stage.STOPPED if self.state.saved_step < 0:
                return f"by {self.state.stopped_by}, before anything was saved"
            case Stage.STOPPED:
                return f"by {self.state.stopped_by}, state saved at step {self.state.saved_step}"
            case Stage.HALTED:
                return self.state.question
        return ""

    @property
    def headline(self) -> str:
        return f"{self.created.name}: {self.stage}" + (f" ({self.message})" if self.message else "")

    @property
    def progress(self) -> str:
        text = f"step {self.step} of {self.story.steps}"
        text += f", loss {self.loss:.3f}" if self.loss is not None else ""
        return text + (
            f", {self.tokens_per_second:,.0f} tokens/s"
            if self.tokens_per_second is not None
            else ""
        )

    def incident_lines(self) -> Iterator[str]:
        """One line an incident."""
        if not self.story.incidents:
            yield "  no incidents"
        for incident in self.story.incidents:
            facts = _facts_of(incident)
            where = f" ({facts['where']})" if facts["where"] else ""
            cost = ""
            if incident.closed:
                cost = f"{facts['steps_lost']} steps and {facts['seconds_lost']:.1f} s lost, "
            yield (
                f"  incident {incident.number} at step {facts['step']}: {facts['cause']}{where}, "
                f"{cost}{facts['outcome']}"
            )

    def payload(self) -> dict[str, Any]:
        """Everything `status` says, for a program."""
        return {
            "name": self.created.name,
            "stage": self.stage,
            "message": self.message,
            "lineage": self.state.lineage,
            "attempt": self.state.attempt.name if self.state.attempt else "",
            "step": self.step,
            "steps": self.story.steps,
            "loss": self.loss,
            "tokens_per_second": self.tokens_per_second,
            "validation_perplexity": self.perplexity,
            "unigram_perplexity": self.created.unigram_perplexity or None,
            "nodes": {name: node.role for name, node in self.state.nodes.items()},
            "incidents": [_facts_of(incident) for incident in self.story.incidents],
        }


def _facts_of(incident: IncidentRecord) -> dict[str, Any]:
    """An incident's facts: the diagnosis where there is one, else the first sign."""
    first = incident.seen[0] if incident.seen else None
    diagnosed, closed = incident.diagnosed, incident.closed
    best = diagnosed or first
    where = ""
    if best is not None:
        named = best.event
        where = named.node + (f" rank {named.rank}" if named.rank >= 0 else "")
    return {
        "number": incident.number,
        "step": first.step if first else None,
        "cause": diagnosed.event.cause if diagnosed else "not yet diagnosed",
        "where": where,
        "outcome": closed.event.outcome if closed else "open",
        "steps_lost": closed.event.steps_lost if closed else None,
        "seconds_lost": closed.event.seconds_lost if closed else None,
    }


# The end of a run ---------------------------------------------------------------------------------


def summary(run: RunDirectory) -> str:
    """What came of the run, for the end of a terminal session."""
    report = RunReport(run)
    lines = [report.headline, f"  {report.progress}, {_duration(report.story.totals.wall)} in all"]
    if report.perplexity is not None:
        bar = f"; a unigram model of the same data has {report.created.unigram_perplexity:.1f}"
        lines.append(
            "  validation perplexity "
            f"{report.perplexity:.1f}{bar if report.created.unigram_perplexity else ''}"
        )
    lines += report.incident_lines()
    if (page := run.chronicle / "index.html").exists():
        lines.append(f"  what happened, for reading: {_near(page)} (chronicle.md beside it)")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        (f"{hours} h " if hours else "")
        + (f"{minutes} min " if minutes or hours else "")
        + f"{rest} s"
    )


def _near(path: Path) -> str:
    """Relative to the working directory, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
