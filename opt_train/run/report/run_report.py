"""What a run's directory says of it: `opt-train status`, the verbs that ask something of a run, and
the summary at its end."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opt_logbook.record import journal, metrics
from opt_logbook.record.events import RunCreated
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.story.fold import fold_story
from opt_logbook.story.format import moment
from opt_logbook.story.instabilities import InstabilityRecord, instabilities_of
from opt_logbook.story.records import IncidentRecord, Story

from opt_train.clusters.cluster import RunQueue
from opt_train.clusters.make_cluster import make_queue
from opt_train.config.run_config import RunConfig, from_json
from opt_train.protocol.exits import BadInput
from opt_train.run.fold import fold
from opt_train.run.hold import Hold
from opt_train.run.hold_requests import hold_in_force
from opt_train.run.report.leadership import Leadership, place_of, read_leadership
from opt_train.run.report.live_status import read_status
from opt_train.run.state import HELD, INTERRUPTED, TERMINAL, RunState, Stage

LEAVE_SECONDS = 30.0
"""For agents whose lease is over to end their ranks and give the nodes back."""


def is_run(run: RunDirectory) -> bool:
    """Whether it is the directory of a run, perhaps of one that has been submitted and has not
    begun."""
    return any(path.exists() for path in (run.journal, run.lock, run.submit))


def report_of(path: Path) -> "RunReport":
    """The report of the run at `path`.

    Raises:
        BadInput: there is none.
    """
    return RunReport(RunDirectory(path))


class RunReport:
    """A run as its record tells it now, read without a lock and without a change."""

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
        if state.created is None and not is_run(run):
            raise BadInput(
                f"{run.path} is no run directory: it has no journal; give one like runs/demo"
            )
        self.run = run
        self.state = state
        self.leadership: Leadership = read_leadership(run)
        self.hold: Hold | None = hold_in_force(run, state.hold)
        """In force, on record or not yet."""
        last = self.leadership.last
        self.queue: RunQueue | None = make_queue(run, last.slurm_job if last else "")
        self.story: Story = fold_story(reading, metrics.read(run))
        newest: dict[str, Any] = next((line for line in reversed(self.story.measured.lines)), {})
        self.step: int = newest.get("step", 0)
        self.loss = metrics.number_of(newest, "loss")
        self.tokens_per_second = metrics.number_of(newest, "tokens_per_second")
        self.perplexity = state.validation.perplexity if state.validation else None

    @property
    def name(self) -> str:
        created = self.state.created
        return created.name if created is not None else self.run.path.resolve().name

    @property
    def created(self) -> RunCreated:
        """The first line of the journal.

        Raises:
            BadInput: the run has been submitted, and has not begun.
        """
        if self.state.created is None:
            raise BadInput(
                f"{self.run.path} has not begun; `opt-train status {self.run.path}` says what it "
                "waits for"
            )
        return self.state.created

    @property
    def config(self) -> RunConfig | None:
        """Its newest configuration; None: there is none yet, or none that can be read."""
        try:
            return from_json(self.run.config_json)
        except (OSError, ValueError, BadInput):
            return None

    @property
    def stage(self) -> str:
        """The stage, or what the journal alone cannot know: nobody leads the run though it has not
        come to its end, it is held, or a supervisor has just begun to lead it."""
        stage, holder = self.state.stage, self.leadership.holder
        # Its first line comes when it has nodes: until then the journal tells how the last one
        # ended.
        if holder is not None:
            return Stage.ASSEMBLING if holder.leader > self.state.leader else stage
        if self.hold is not None and stage not in (Stage.FINISHED, Stage.HALTED):
            return HELD
        return stage if stage in TERMINAL or stage is Stage.NEW else INTERRUPTED

    @property
    def shown(self) -> dict[str, Any]:
        """What the supervisor that leads showed last; empty: there is none, or it shows nothing."""
        holder = self.leadership.holder
        return read_status(self.run, holder.leader) if holder is not None else {}

    @property
    def is_full(self) -> bool:
        """Whether its file system has no room for another line of the journal."""
        # Asked of the file system: to find it out by writing would be a change.
        room = os.statvfs(self.run.path)
        return room.f_bavail == 0 and room.f_blocks > 0

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the newest pace; None: it is not known."""
        created, pace = self.state.created, self.tokens_per_second
        if created is None or not pace:
            return None
        return max(0, self.story.steps - self.step) * created.tokens_per_step / pace

    @property
    def silence(self) -> str:
        """What to know of a supervisor of which nothing has been seen for long; empty: nothing."""
        holder, seconds = self.leadership.holder, self.leadership.silent_seconds
        if holder is None or not holder.leader or not seconds:
            return ""
        return (
            f"nothing has been seen of the supervisor, {place_of(holder)}, for "
            f"{_duration(seconds)}: it obeys when it can, or whoever leads the run next does"
        )

    def ranks_may_live(self, now: float) -> bool:
        """Whether ranks may train on that nobody leads any more."""
        config = self.config
        if self.state.live is None or config is None or self.leadership.holder is not None:
            return False
        return now < self.leadership.touched + config.supervisor.orphan_seconds + LEAVE_SECONDS

    @property
    def orphans(self) -> str:
        """What becomes of ranks that nobody leads."""
        config = self.config
        patience = config.supervisor.orphan_seconds if config is not None else 0.0
        until = moment(self.leadership.touched + patience)
        return (
            f"ranks without a supervisor train on until {until} at most, and what they do since "
            f"the last save is kept only if one is started before"
        )

    @property
    def message(self) -> str:
        """What a person should know about the stage."""
        if self.stage == INTERRUPTED:
            return "nobody leads it; the command that started it goes on from the last checkpoint"
        if self.hold is not None:
            held = str(self.hold) if self.stage == HELD else f"held {self.hold}"
            return f"{held}; {self.state.question}" if self.stage == Stage.HALTED else held
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
        return f"{self.name}: {self.stage}" + (f" ({self.message})" if self.message else "")

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
        unstable = instabilities_of(self.story)
        if not self.story.incidents and not unstable:
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

    def instability_lines(self) -> Iterator[str]:
        """One line an instability of training."""
        for record in instabilities_of(self.story):
            first = record.seen[0]
            done = ", ".join(f"{seen.event.alarm}: {seen.event.rung}" for seen in record.seen)
            yield (
                f"  instability {record.number} at step {first.step or 0}: {done}; {record.outcome}"
            )

    def lemon_lines(self) -> Iterator[str]:
        """One line a node of the run that is a repeat offender."""
        for node, noted in sorted(self.state.lemons.items()):
            yield f"  {node} is a repeat offender: {noted.why}"

    def payload(self) -> dict[str, Any]:
        """Everything `status` says, for a program."""
        created = self.state.created
        return {
            "name": self.name,
            "stage": self.stage,
            "message": self.message,
            "hold": asdict(self.hold) if self.hold is not None else None,
            "leader": asdict(holder) if (holder := self.leadership.holder) is not None else None,
            "lineage": self.state.lineage,
            "ledger_of": created.ledger_of if created else "",
            "attempt": self.state.attempt.name if self.state.attempt else "",
            "step": self.step,
            "steps": self.story.steps,
            "loss": self.loss,
            "tokens_per_second": self.tokens_per_second,
            "validation_perplexity": self.perplexity,
            "unigram_perplexity": (created.unigram_perplexity or None) if created else None,
            "nodes": {name: node.role for name, node in self.state.nodes.items()},
            "lemons": {node: noted.why for node, noted in sorted(self.state.lemons.items())},
            "incidents": [_facts_of(incident) for incident in self.story.incidents],
            "instabilities": [_alarms_of(record) for record in instabilities_of(self.story)],
        }


def _alarms_of(record: InstabilityRecord) -> dict[str, Any]:
    return {
        "number": record.number,
        "step": record.seen[0].step,
        "alarms": [seen.event.alarm for seen in record.seen],
        "rungs": [seen.event.rung for seen in record.seen],
        "outcome": record.outcome,
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
    lines += [*report.incident_lines(), *report.instability_lines()]
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
