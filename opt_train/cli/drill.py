"""`opt-train drill`: kill a node of a running run on purpose, and report what came of it."""

import argparse
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from opt_logbook.record import inbox, lock
from opt_logbook.record.events import Entry
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.person import user
from opt_train.cli.progress import announce
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.run_config import from_json
from opt_train.protocol.exits import DONE, NO, BadInput
from opt_train.run.drill import DrillOutcome, buffers_of, choose_victim, note_of, outcome_of
from opt_train.run.report.run_report import RunReport

T = TypeVar("T")

NOTE_SECONDS = 15.0
"""For the note to be journalled: a supervisor that does not do that would not see the node die."""
POLL_SECONDS = 0.2
SAME_CLOCK_SECONDS = 1.0
"""Two clocks that are nearer are one to a reader of the report."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", default="", metavar="NODE", help="by default the last one")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="longest wait for training to go on; by default 600",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )


def run(flags: argparse.Namespace) -> int:
    """Kill a node of the run at `flags.run`; `NO` if training has not gone on in time.

    Raises:
        BadInput: the run does not train, or could not go on without the node.
    """
    directory = RunDirectory(flags.run)
    report = RunReport(directory)
    # Asked first: without a supervisor a killed node would simply be a dead node.
    holder = lock.live_holder_of(directory)
    if holder is None or not holder.leader:
        raise BadInput(
            f"{flags.run} has no supervisor that could answer a drill ({report.headline}); start "
            "it with `opt-train run`"
        )
    cluster = from_json(directory.config_json).cluster
    node = choose_victim(report.state, flags.node, cluster.nodes_at_least)
    plan = (
        f"{node} of {report.created.name} is killed, as if it had lost power, at step "
        f"{report.step}; standing by: {', '.join(buffers_of(report.state)) or 'none'}"
    )
    if flags.dry_run:
        print(f"would be done: {plan}")
        return DONE
    # A person sees it come about; a program gets it whole.
    say = announce if flags.json else partial(print, flush=True)
    say(plan)
    outcome = _drill(directory, cluster, node, flags.seconds, say)
    print(json.dumps(asdict(outcome), indent=2) if flags.json else _end(outcome, flags.seconds))
    return DONE if outcome.training_went_on else NO


def _drill(
    directory: RunDirectory,
    config: ClusterConfig,
    node: str,
    seconds: float,
    say: Callable[[str], None],
) -> DrillOutcome:
    # A note of an earlier drill says the same; this one comes behind all that is there now.
    newest = max(entry.seq for entry in read(directory.journal).entries)
    text = f"drill: {node} is killed on purpose, by {user()} on {socket.gethostname()}"
    try:
        inbox.drop(directory, {"kind": "note", "author": user(), "text": text})
    except OSError as error:
        raise BadInput(
            f"{directory.inbox} cannot be written ({error.strerror}); make it writable"
        ) from None
    noted = _wait_for(lambda: note_of(_entries_behind(directory, newest), text), NOTE_SECONDS)
    if noted is None:
        raise BadInput(
            f"the supervisor has not journalled a note within {NOTE_SECONDS:g} s, so nothing was "
            f"killed; look at {directory.logs / 'supervisor.log'}"
        )
    # Something may have failed by itself meanwhile.
    choose_victim(RunReport(directory).state, node, config.nodes_at_least)
    # It was journalled a moment ago: so much is the other clock ahead of this one.
    ahead = noted.time - time.time()
    killed = time.time() + (ahead if abs(ahead) > SAME_CLOCK_SECONDS else 0.0)
    # By the same hand that the supervisor fences with: what it cannot kill, nobody could.
    if not make_cluster(config, directory).fence(node):
        raise BadInput(f"{node} could not be killed; look whether its processes hang in the kernel")
    say(f"{node} is dead; waiting for training to go on")
    seen: list[str] = []

    def outcome() -> DrillOutcome | None:
        now = outcome_of(node, killed, _entries_behind(directory, noted.seq))
        for sentence in _progress(now):
            if sentence not in seen:
                seen.append(sentence)
                say(sentence)
        return now if now.training_went_on or now.question else None

    found = _wait_for(outcome, seconds)
    return found or outcome_of(node, killed, _entries_behind(directory, noted.seq))


def _entries_behind(directory: RunDirectory, seq: int) -> list[Entry]:
    return [entry for entry in read(directory.journal).entries if entry.seq > seq]


def _wait_for(ask: Callable[[], T | None], seconds: float) -> T | None:
    deadline = time.monotonic() + seconds
    while (answer := ask()) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return answer


def _progress(outcome: DrillOutcome) -> list[str]:
    sentences = []
    if outcome.detected_seconds is not None:
        sentences.append(f"seen after {outcome.detected_seconds:.1f} s: {outcome.seen}")
    if outcome.cause:
        sentences.append(f"diagnosed as {outcome.cause}")
    if outcome.buffer_node:
        sentences.append(f"{outcome.buffer_node} takes the place of {outcome.node}")
    if outcome.attempt:
        sentences.append(
            f"attempt {outcome.attempt} begins at step {outcome.restarted_from} "
            f"on {outcome.nodes} nodes"
        )
    return sentences


def _end(outcome: DrillOutcome, seconds: float) -> str:
    if outcome.training_went_on:
        return (
            f"training went on {outcome.training_seconds:.1f} s after the kill; "
            f"{outcome.steps_lost} steps had to be done again"
        )
    if outcome.question:
        return f"the run stopped for a person: {outcome.question}"
    return f"training has not gone on within {seconds:g} s"
