"""The supervisor is killed at 20 seeded moments; the same command, started again, adopts or fences and goes on."""

import os
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.end_to_end import driving

DEATHS = 20
STEPS = 400


@pytest.mark.timeout(600)
def test_killing_the_supervisor_again_and_again_loses_nothing(tmp_path: Path) -> None:
    folder, run = tmp_path, driving.run_directory(tmp_path)
    moments = random.Random(20)
    more = (f"train.steps={STEPS}", "checkpoint.every_steps=20", "faults.plan=kill-rank@60")
    process = driving.start(folder, *more)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, folder)
        for death in range(1, DEATHS + 1):
            # Some deaths come while agents dial in or a generation starts, some in the middle of training.
            time.sleep(moments.choice((0.0, 0.1, 0.5, 1.5)) * (0.5 + moments.random()))
            assert process.poll() is None, "the run was over before the supervisor had died often enough"
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = driving.start(folder, *more)
            driving.wait_for(lambda n=death: starts(run) > n, 60, process, folder)
        assert driving.finish(process, folder, 240) == 0, driving.tail(folder)

        kinds = driving.kinds(run)
        assert kinds.count("supervisor_started") == DEATHS + 1
        assert kinds.count("run_finished") == 1
        assert "agents_adopted" in kinds
        assert no_two_generations_trained_at_once(run)
        taken = {line["step"] for lines in driving.metrics(run).values() for line in lines.values()}
        assert taken == set(range(1, STEPS + 1)), "a step left no metrics line"
        assert driving.processes_of(folder) == []
    finally:
        driving.end(process, folder)


def starts(run: driving.RunDirectory) -> int:
    return driving.kinds(run).count("supervisor_started")


def no_two_generations_trained_at_once(run: driving.RunDirectory) -> bool:
    """By the ranks' own logs: a generation's last step lies before the next one's first."""
    spans: dict[int, tuple[float, float]] = {}
    for taken in driving.steps_taken(run):
        first, last = spans.get(taken.generation, (taken.time, taken.time))
        spans[taken.generation] = (min(first, taken.time), max(last, taken.time))
    assert spans, "the ranks wrote no steps to their logs"
    ordered = [spans[generation] for generation in sorted(spans)]
    return all(earlier[1] < later[0] for earlier, later in pairwise(ordered))


@pytest.mark.timeout(180)
def test_a_node_that_dies_with_the_supervisor_costs_what_the_chronicle_says(tmp_path: Path) -> None:
    folder, run = tmp_path, driving.run_directory(tmp_path)
    process = driving.start(folder)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 16, 120, process, folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rank = driving.rank_process(folder, rank=1)
        agent = driving.parent_of(rank)
        for pid in (agent, rank):
            os.kill(pid, signal.SIGKILL)
        known = driving.newest_step(run)

        process = driving.start(folder)
        assert driving.finish(process, folder, 120) == 0, driving.tail(folder)
        [failed] = driving.of_kind(run, "failure_seen")
        [closed] = driving.of_kind(run, "incident_closed")
        restarted = driving.of_kind(run, "attempt_started")[-1]
        assert failed.step >= known, "the new supervisor had forgotten how far training was"
        assert closed.event.steps_lost == failed.step - restarted.step
    finally:
        driving.end(process, folder)
