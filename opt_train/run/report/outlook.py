"""Where a run is, what it does, what it waits for and what comes next, in phrases for a person who
looks at it from outside: by its record, its lock, what its supervisor shows, and its scheduler."""

from collections.abc import Iterator
from dataclasses import dataclass

from opt_logbook.story.format import duration, moment

from opt_train.clusters.cluster import JobTask, QueuedJob
from opt_train.run.drill import buffers_of
from opt_train.run.report.leadership import place_of
from opt_train.run.report.run_report import RunReport
from opt_train.run.state import HELD, INTERRUPTED, NODES_END, NODES_LOST, VACANT, Stage

START = "the command that started it goes on"
AT_CHECKPOINT = ("replace_at_checkpoint", "drain")


@dataclass(frozen=True, slots=True)
class Outlook:
    """Each a list of phrases, perhaps empty."""

    where: tuple[str, ...]
    doing: tuple[str, ...]
    waiting_for: tuple[str, ...]
    next: tuple[str, ...]


def outlook_of(report: RunReport, jobs: tuple[QueuedJob, ...], now: float) -> Outlook:
    """The outlook of the run at `now`, Unix seconds.

    Args:
        jobs: those that its scheduler has; none where it could not be asked.
    """
    return Outlook(
        tuple(_where(report, jobs)),
        tuple(_doing(report)),
        tuple(_waiting_for(report, jobs)),
        tuple(_next(report, jobs, now)),
    )


def _where(report: RunReport, jobs: tuple[QueuedJob, ...]) -> Iterator[str]:
    leadership, state = report.leadership, report.state
    holder, last = leadership.holder, leadership.last
    if holder is not None:
        verb = "leads" if holder.leader else "trains it alone"
        yield f"{place_of(holder)} {verb}"
    else:
        # Where it was led last its logs are, and perhaps processes.
        seen = f"; {place_of(last)} did until {moment(leadership.touched)}" if last else ""
        yield f"nobody leads it{seen}"
    live = state.live
    if holder is not None and live is not None:
        yield f"it trains on {_some(live.nodes)}"
        if standing := buffers_of(state):
            yield f"{_some(standing)} standing by"
    for job in jobs:
        left = f", {duration(job.seconds_left)} left" if job.seconds_left is not None else ""
        yield f"Slurm job {job.job} ({job.task}) is {job.state}{left}"


def _doing(report: RunReport) -> Iterator[str]:
    yield str(report.stage)
    if report.state.attempt is not None:
        yield f"attempt {report.state.attempt.name}"
    yield report.progress
    created = report.state.created
    if created is not None and created.ledger_of:
        yield f"under the ledger of {created.ledger_of}"


def _waiting_for(report: RunReport, jobs: tuple[QueuedJob, ...]) -> Iterator[str]:
    stage = report.stage
    if stage == HELD:
        yield f"`opt-train resume {report.run.path}`"
    if stage == Stage.HALTED:
        yield f"a person: {report.state.question}"
    if report.is_full:
        yield f"space on the file system of {report.run.path}: nothing can be journalled"
    # The scheduler's own reason is the best there is: Resources, Priority, ReqNodeNotAvail.
    for job in jobs:
        if job.waits:
            yield f"Slurm job {job.job} ({job.task}), {job.state} ({job.reason})"
    if waiting := report.shown.get("waiting_for"):
        yield str(waiting)
    if report.silence:
        yield report.silence
    if stage == INTERRUPTED and not jobs:
        yield "somebody to start it again"


def _next(report: RunReport, jobs: tuple[QueuedJob, ...], now: float) -> Iterator[str]:
    stage, state = report.stage, report.state
    starts = any(job.task is JobTask.SUPERVISOR for job in jobs)
    # What agents hold in memory may be gone with whoever led them.
    newest = state.newest_good(shared_only=report.leadership.holder is None)
    origin = f"from step {newest.step}" if newest is not None else "from the beginning"
    match stage:
        case Stage.NEW | Stage.ASSEMBLING | Stage.RECOVERING:
            yield f"an attempt begins {origin}"
        case Stage.STARTING | Stage.TRAINING:
            yield from _while_training(report, jobs, now)
        case Stage.STOPPING:
            by = state.stop_wanted.reason if state.stop_wanted is not None else ""
            again = report.hold is None and by in (NODES_END, NODES_LOST)
            yield "it gives its nodes back" + (" and asks for others" if again else " and rests")
        case Stage.FAILING:
            yield f"the cause is named, and it begins again {origin} or asks a person"
        case Stage.REPLACING:
            yield f"an attempt begins {origin} with the nodes that stand ready"
        case Stage.FINISHING:
            yield "its result is journalled"
        case Stage.STOPPED:
            yield f"nothing by itself; {START} {origin}"
        case Stage.HALTED:
            yield f"nothing by itself; when that is mended, {START} {origin}"
        case _ if stage == INTERRUPTED:
            if report.ranks_may_live(now):
                yield report.orphans
            leader = "the supervisor in its Slurm job" if starts else START
            yield f"{leader}{' goes on' if starts else ''} {origin}"
        case _ if stage == HELD:
            if report.ranks_may_live(now):
                yield report.orphans
            yield f"nothing until it is resumed; then it goes on {origin}"


def _while_training(report: RunReport, jobs: tuple[QueuedJob, ...], now: float) -> Iterator[str]:
    config, state = report.config, report.state
    if report.stage == Stage.STARTING:
        yield f"step {report.step + 1}"
    # A configuration of another version says nothing of saves and limits.
    if config is None:
        return
    every = config.checkpoint.every_steps
    save = min((report.step // every + 1) * every, report.story.steps)
    yield f"a checkpoint at step {save}"
    for found in state.findings:
        event = found.event
        planned = event.action in AT_CHECKPOINT and event.mode == "act"
        if planned and state.live is not None and event.node in state.live.nodes:
            ready = "" if buffers_of(state) else ", if a buffer node has come by then"
            yield f"{event.node} is replaced after that ({event.cause}: {event.detail}){ready}"
    if VACANT in state.replacements.values():
        yield "vacant places are filled after a checkpoint, once nodes for them have come"
    if (seconds := report.seconds_left) is not None:
        yield f"the last step, {report.story.steps}, at about {moment(now + seconds)}"
    before = config.cluster.slurm.stop_before_seconds
    for job in jobs:
        if job.task is not JobTask.MORE_NODES and job.seconds_left is not None and not job.waits:
            over = moment(now + job.seconds_left)
            what = "the nodes'" if job.task is JobTask.NODES else "the supervisor's"
            spare = f", and a save {duration(before)} before" if job.task is JobTask.NODES else ""
            yield f"{what} time limit at {over}{spare}"


def _some(nodes: tuple[str, ...] | list[str]) -> str:
    """A few names, and how many more."""
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return f"{', '.join(nodes[:4])}{more}"
