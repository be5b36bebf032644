"""The supervisor is killed at seeded moments; the same command, started again, adopts or fences and
goes on."""

import contextlib
import os
import random
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from tests.end_to_end import driving

STRUCK = ("failure_seen", "generation_killed", "incident_diagnosed", "attempt_started")
"""Deaths that come on top of a rank's, as soon as the journal says so much of it."""


@pytest.mark.parametrize("deaths", [8, pytest.param(20, marks=pytest.mark.whole)])
def test_killing_the_supervisor_again_and_again_loses_nothing(deaths: int, tmp_path: Path) -> None:
    parts = len(STRUCK) + 1
    struck = {deaths * part // parts: kind for part, kind in enumerate(STRUCK, start=1)}
    folder, run = tmp_path, driving.run_directory(tmp_path)
    moments = random.Random(20)
    more = (*driving.ENDLESS, "checkpoint.every_steps=20")
    process = driving.start(folder, *more)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, folder)
        for death in range(1, deaths + 1):
            if death in struck:
                strike(run, process, folder, until=struck[death])
            elif death == deaths:
                train_on(5, run, process, folder)  # all live: the next one adopts them
            else:
                # Some deaths come while agents dial in or a generation starts, some in the middle
                # of training.
                time.sleep(moments.choice((0.0, 0.1, 0.5, 1.5)) * (0.5 + moments.random()))
            assert process.poll() is None, f"the run ended by itself:\n{driving.tail(folder)}"
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = driving.start(folder, *more)
            driving.wait_for(lambda n=death: starts(run) > n, 60, process, folder)
        train_on(20, run, process, folder)
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, folder, 120) == 75, driving.tail(folder)

        kinds = driving.kinds(run)
        assert kinds.count("supervisor_started") == deaths + 1
        assert "agents_adopted" in kinds
        [stopped] = driving.of_kind(run, "run_stopped")
        assert no_two_generations_trained_at_once(run, at_least=len(STRUCK) + 1)
        taken = {line["step"] for lines in driving.metrics(run).values() for line in lines.values()}
        assert taken == set(range(1, stopped.event.saved_step + 1)), "a step left no metrics line"
        assert driving.processes_of(folder) == []
    finally:
        driving.end(process, folder)


def strike(run: RunDirectory, process: subprocess.Popen[str], folder: Path, until: str) -> None:
    """Kill a rank that trains, and wait until the journal has one more entry of the kind
    `until`."""
    train_on(
        25, run, process, folder
    )  # past a checkpoint: failures without progress would halt the run
    before = driving.kinds(run).count(until)
    with contextlib.suppress(ProcessLookupError):
        os.kill(driving.rank_process(folder, rank=1), signal.SIGKILL)
    driving.wait_for(lambda: driving.kinds(run).count(until) > before, 60, process, folder)


def train_on(steps: int, run: RunDirectory, process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until so many steps more than now are done."""
    enough = driving.newest_step(run) + steps
    driving.wait_for(lambda: driving.newest_step(run) >= enough, 120, process, folder)


def starts(run: RunDirectory) -> int:
    return driving.kinds(run).count("supervisor_started")


def no_two_generations_trained_at_once(run: RunDirectory, at_least: int) -> bool:
    """By the ranks' own logs: a generation's last step lies before the next one's first.
    `at_least`: how many trained, as one alone would show nothing."""
    spans: dict[int, tuple[float, float]] = {}
    for taken in driving.steps_taken(run):
        first, last = spans.get(taken.generation, (taken.time, taken.time))
        spans[taken.generation] = (min(first, taken.time), max(last, taken.time))
    assert len(spans) >= at_least, f"only {len(spans)} generations trained"
    ordered = [spans[generation] for generation in sorted(spans)]
    return all(earlier[1] < later[0] for earlier, later in pairwise(ordered))


def test_a_node_that_dies_with_the_supervisor_costs_what_the_chronicle_says(tmp_path: Path) -> None:
    folder, run = tmp_path, driving.run_directory(tmp_path)
    process = driving.start(folder, *driving.ENDLESS)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 16, 120, process, folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rank = driving.rank_process(folder, rank=1)
        agent = driving.parent_of(rank)
        for pid in (agent, rank):  # the rank may be gone with its agent
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        known = driving.newest_step(run)

        process = driving.start(folder, *driving.ENDLESS)
        driving.wait_for(lambda: "incident_closed" in driving.kinds(run), 120, process, folder)
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, folder, 60) == 75, driving.tail(folder)
        [failed] = driving.of_kind(run, "failure_seen")
        [closed] = driving.of_kind(run, "incident_closed")
        restarted = driving.of_kind(run, "attempt_started")[-1]
        assert failed.step >= known, "the new supervisor had forgotten how far training was"
        assert closed.event.steps_lost == failed.step - restarted.step
    finally:
        driving.end(process, folder)
