"""What a run's directory says of it: `opt-train status`, `stop`, and the summary at a run's end."""

import getpass
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_logbook.record import inbox, journal, lock, metrics
from opt_logbook.record.events import RunCreated
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.story.incidents import Incident, Story, fold_story

from opt_train.protocol.exits import DONE, NO, BadInput
from opt_train.run.fold import fold
from opt_train.run.state import INTERRUPTED, TERMINAL, RunState, Stage


class About:
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
            told = _told(incident)
            where = f" ({told['where']})" if told["where"] else ""
            cost = ""
            if incident.closed:
                cost = f"{told['steps_lost']} steps and {told['seconds_lost']:.1f} s lost, "
            yield (
                f"  incident {incident.number} at step {told['step']}: {told['cause']}{where}, "
                f"{cost}{told['outcome']}"
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
            "incidents": [_told(incident) for incident in self.story.incidents],
        }


def _told(incident: Incident) -> dict[str, Any]:
    """An incident's facts: the diagnosis where there is one, else the first sign."""
    first, diagnosed, closed = (
        incident.seen[0] if incident.seen else None,
        incident.diagnosed,
        incident.closed,
    )
    named = diagnosed.event if diagnosed else first.event if first else None
    where = (named.node + (f" rank {named.rank}" if named.rank >= 0 else "")) if named else ""
    return {
        "number": incident.number,
        "step": first.step if first else None,
        "cause": diagnosed.event.cause if diagnosed else "not yet diagnosed",
        "where": where,
        "outcome": closed.event.outcome if closed else "open",
        "steps_lost": closed.event.steps_lost if closed else None,
        "seconds_lost": closed.event.seconds_lost if closed else None,
    }


# Verbs --------------------------------------------------------------------------------------------


def status(path: Path, as_json: bool) -> int:
    """Print how the run at `path` is doing."""
    about = About(RunDirectory(path))
    if as_json:
        print(json.dumps(about.payload(), indent=2))
        return DONE
    print(about.headline)
    print(f"  attempt {about.payload()['attempt'] or '-'}, {about.progress}")
    nodes = (
        ", ".join(f"{name} {node.role}" for name, node in sorted(about.state.nodes.items()))
        or "none"
    )
    print(f"  {'nodes at the end' if about.stage in TERMINAL else 'nodes'}: {nodes}")
    print("\n".join(about.incident_lines()))
    return DONE


def stop(path: Path) -> int:
    """Ask whoever leads the run to save and stop."""
    run = RunDirectory(path)
    about = About(run)
    holder = lock.live_holder_of(run)
    if holder is None:
        print(f"nothing to stop: {about.headline}")
        return NO
    if not holder.leader:
        raise BadInput(
            f"{path} is trained by `opt-train train`, which obeys signals alone; "
            f"send TERM to process {holder.pid} on {holder.host}"
        )
    try:
        inbox.drop(run, {"kind": "stop", "by": f"{_user()} on {socket.gethostname()}"})
    except OSError as error:
        mend = f"make it writable, or send TERM to process {holder.pid} on {holder.host}"
        raise BadInput(f"{run.inbox} cannot be written ({error.strerror}); {mend}") from None
    print(
        f"asked {about.created.name} to save and stop; `opt-train status {path}` tells when it has"
    )
    return DONE


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in many containers
        return f"user {os.getuid()}"


# The end of a run ---------------------------------------------------------------------------------


def summary(run: RunDirectory) -> str:
    """What came of the run, for the end of a terminal session."""
    about = About(run)
    lines = [about.headline, f"  {about.progress}, {_duration(about.story.totals.wall)} in all"]
    if about.perplexity is not None:
        bar = f"; a unigram model of the same data has {about.created.unigram_perplexity:.1f}"
        lines.append(
            "  validation perplexity "
            f"{about.perplexity:.1f}{bar if about.created.unigram_perplexity else ''}"
        )
    lines += about.incident_lines()
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
