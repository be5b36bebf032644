"""The supervisor is killed at 20 seeded moments; the same command, started again, adopts or fences and goes on."""

import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.end_to_end import driving

DEATHS = 20


@pytest.mark.timeout(600)
def test_killing_the_supervisor_again_and_again_loses_nothing(tmp_path: Path) -> None:
    folder, run = tmp_path, driving.run_directory(tmp_path)
    moments = random.Random(20)
    more = ("train.steps=240", "checkpoint.every_steps=20", "faults.plan=kill-rank@60")
    process = driving.start(folder, *more)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, folder)
        for _ in range(DEATHS):
            # Some deaths come while agents connect and a generation starts, some in the middle of training.
            time.sleep(moments.choice((0.1, 0.4, 1.0, 1.6)) * (0.5 + moments.random()))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = driving.start(folder, *more)
        assert driving.finish(process, folder, 240) == 0, driving.tail(folder)

        kinds = driving.kinds(run)
        assert kinds.count("supervisor_started") >= 10, "the run was over before the supervisor had died often enough"
        assert kinds.count("run_finished") == 1
        assert "agents_adopted" in kinds
        assert no_two_generations_trained_at_once(run)
        taken = {line["step"] for lines in driving.metrics(run).values() for line in lines.values()}
        assert taken >= set(range(1, 241)) or taken >= set(range(240)), "a step left no metrics line"
        assert driving.processes_of(folder) == []
    finally:
        driving.end(process, folder)


def no_two_generations_trained_at_once(run: driving.RunDirectory) -> bool:
    """By the ranks' own logs: a generation's last step lies before the next one's first."""
    spans: dict[int, tuple[float, float]] = {}
    for taken in driving.steps_taken(run):
        first, last = spans.get(taken.generation, (taken.time, taken.time))
        spans[taken.generation] = (min(first, taken.time), max(last, taken.time))
    assert spans, "the ranks wrote no steps to their logs"
    ordered = [spans[generation] for generation in sorted(spans)]
    return all(earlier[1] < later[0] for earlier, later in pairwise(ordered))
