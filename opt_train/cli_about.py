"""What a run's directory says of it: `opt-train status`, `checkpoints`, `stop`, and the summary at a run's end."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_logbook import inbox, journal, lock, metrics
from opt_logbook.events import (
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    FailureSeen,
    IncidentClosed,
    IncidentDiagnosed,
    LineageOpened,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    ValidationMeasured,
)
from opt_logbook.run_directory import RunDirectory

from opt_train.protocol.exits import DONE, NO, BadInput


@dataclass(slots=True)
class IncidentLine:
    """One incident as a person wants it: what, where, what it cost."""

    number: int
    step: int
    cause: str = "being diagnosed"
    where: str = ""
    outcome: str = "open"
    steps_lost: int = 0
    seconds_lost: float = 0.0


@dataclass(slots=True)
class Story:
    """What the journal and the metrics say, gathered for a screen."""

    created: RunCreated
    began: float
    """Unix seconds of `run_created`."""
    state: str = "running"
    message: str = ""
    attempt: str = ""
    lineage: int = 0
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    perplexity: float | None = None
    seconds: float = 0.0
    nodes: dict[str, str] = field(default_factory=dict)
    incidents: dict[int, IncidentLine] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)


def story_of(run: RunDirectory) -> Story:
    """Read the run at `run`.

    Raises:
        BadInput: there is no run.
    """
    reading = journal.read(run.journal)
    if not reading.entries or not isinstance(reading.entries[0].event, RunCreated):
        raise BadInput(f"{run.path} is no run directory: it has no journal; give one like runs/demo")
    first = reading.entries[0]
    assert isinstance(first.event, RunCreated)
    story = Story(first.event, first.time)
    for entry in reading.entries:
        story.attempt = entry.attempt or story.attempt
        story.seconds = entry.time - first.time
        _tell(story, entry.event, entry.step or 0)
        if isinstance(entry.event, CheckpointCommitted):
            story.checkpoints[entry.event.path] = {
                "path": entry.event.path,
                "attempt": entry.attempt,
                "step": entry.step,
                "bytes": entry.event.bytes,
                "healthy": entry.event.healthy,
                "state": "good",
            }
    lines = metrics.read(run).lines
    if lines:
        newest = lines[-1]
        story.step = int(newest["step"])
        story.loss = metrics.number_of(newest, "loss")
        story.tokens_per_second = metrics.number_of(newest, "tokens_per_second")
    if story.state == "running" and lock.live_holder_of(run) is None:
        story.state = "not running"
        story.message = "its supervisor is gone; `opt-train run` with the same configuration goes on"
    return story


def _tell(story: Story, event: object, step: int) -> None:
    """Fold one event into the story."""
    match event:
        case LineageOpened():
            story.lineage = event.lineage
        case AttemptStarted():
            story.state, story.message, story.step = "running", "", step
        case CheckpointRejected() if event.path in story.checkpoints:
            story.checkpoints[event.path]["state"] = "rejected"
        case CheckpointRetired():
            story.checkpoints.pop(event.path, None)
        case ValidationMeasured():
            story.perplexity = event.perplexity
        case RunFinished():
            story.state, story.perplexity, story.seconds = "finished", event.validation_perplexity, event.seconds
        case RunStopped():
            story.state = "stopped"
            story.message = f"by {event.by}, state saved at step {event.saved_step}"
            if event.saved_step < 0:
                story.message = f"by {event.by}, before anything was saved"
        case RunHalted():
            story.state, story.message = "halted", event.question
        case _:
            _tell_failure(story, event, step)


def _tell_failure(story: Story, event: object, step: int) -> None:
    """Fold an event about nodes or incidents."""
    match event:
        case NodeJoined():
            story.nodes[event.node] = event.role
        case NodeFailed():
            story.nodes[event.node] = "failed"
        case NodePromoted():
            story.nodes[event.node] = "active"
        case FailureSeen():
            where = event.node + (f" rank {event.rank}" if event.rank >= 0 else "")
            story.incidents[event.incident] = IncidentLine(event.incident, step, where=where)
        case IncidentDiagnosed() if event.incident in story.incidents:
            line = story.incidents[event.incident]
            line.cause = event.cause
            line.where = event.node + (f" rank {event.rank}" if event.rank >= 0 else "")
        case IncidentClosed() if event.incident in story.incidents:
            line = story.incidents[event.incident]
            line.outcome, line.steps_lost, line.seconds_lost = event.outcome, event.steps_lost, event.seconds_lost


# Verbs --------------------------------------------------------------------------------------------------------


def status(path: Path, as_json: bool) -> int:
    """Print how the run at `path` is doing."""
    run = RunDirectory(path)
    story = story_of(run)
    if as_json:
        print(json.dumps(_payload(story), indent=2))
        return DONE
    created = story.created
    print(f"{created.name}: {story.state}" + (f" ({story.message})" if story.message else ""))
    print(f"  attempt {story.attempt or '-'}, step {story.step} of {created.steps}" + _figures(story))
    nodes = [f"{node} {role}" for node, role in story.nodes.items()]
    print(f"  nodes: {', '.join(nodes) or 'none yet'}")
    print("\n".join(_incident_lines(story)))
    return DONE


def _figures(story: Story) -> str:
    text = f", loss {story.loss:.3f}" if story.loss is not None else ""
    return text + (f", {story.tokens_per_second:,.0f} tokens/s" if story.tokens_per_second is not None else "")


def _payload(story: Story) -> dict[str, Any]:
    return {
        "name": story.created.name,
        "state": story.state,
        "message": story.message,
        "lineage": story.lineage,
        "attempt": story.attempt,
        "step": story.step,
        "steps": story.created.steps,
        "loss": story.loss,
        "tokens_per_second": story.tokens_per_second,
        "validation_perplexity": story.perplexity,
        "unigram_perplexity": story.created.unigram_perplexity or None,
        "nodes": story.nodes,
        "incidents": [
            {
                "number": line.number,
                "step": line.step,
                "cause": line.cause,
                "where": line.where,
                "outcome": line.outcome,
                "steps_lost": line.steps_lost,
                "seconds_lost": line.seconds_lost,
            }
            for line in story.incidents.values()
        ],
    }


def stop(path: Path) -> int:
    """Ask whoever leads the run to save and stop."""
    run = RunDirectory(path)
    story = story_of(run)
    if lock.live_holder_of(run) is None:
        print(f"{story.created.name} is not running: {story.state}")
        return NO
    user = os.environ.get("USER") or f"uid {os.getuid()}"
    inbox.drop(run, {"kind": "stop", "by": f"{user} on {socket.gethostname()}"})
    print(f"asked {story.created.name} to save and stop; `opt-train status {path}` tells when it has")
    return DONE


def checkpoints(path: Path, as_json: bool) -> int:
    """List the checkpoints that have not been retired, oldest first."""
    story = story_of(RunDirectory(path))
    found = list(story.checkpoints.values())
    if as_json:
        print(json.dumps(found, indent=2))
        return DONE
    if not found:
        print(f"{story.created.name} has no checkpoint yet")
    for one in found:
        state = one["state"] if one["healthy"] else f"{one['state']}, saved while training was not well"
        print(f"step {one['step']:>8}  {one['attempt']:>6}  {one['bytes']:>15,} bytes  {one['path']}  {state}")
    return DONE


def summary(run: RunDirectory) -> str:
    """What came of the run, for the end of a terminal session."""
    story = story_of(run)
    created = story.created
    head = f"{created.name}: {story.state}" + (f" ({story.message})" if story.message else "")
    lines = [head, f"  {story.step} of {created.steps} steps in {_duration(story.seconds)}" + _figures(story)]
    if story.perplexity is not None:
        bar = f"; a unigram model of the same data has {created.unigram_perplexity:.1f}"
        lines.append(f"  validation perplexity {story.perplexity:.1f}" + (bar if created.unigram_perplexity else ""))
    lines += _incident_lines(story)
    if (run.chronicle / "index.html").exists():
        lines.append(f"  the chronicle: {_near(run.chronicle / 'index.html')} (and chronicle.md beside it)")
    return "\n".join(lines)


def _incident_lines(story: Story) -> Iterator[str]:
    if not story.incidents:
        yield "  no incidents"
    for line in story.incidents.values():
        cost = f"{line.steps_lost} steps and {line.seconds_lost:.1f} s lost, " if line.outcome != "open" else ""
        yield f"  incident {line.number} at step {line.step}: {line.cause} ({line.where}), {cost}{line.outcome}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + (f"{minutes} min " if minutes or hours else "") + f"{rest} s"


def _near(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
