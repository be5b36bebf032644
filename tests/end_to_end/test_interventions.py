"""A person changes what a run trains with while it trains: obeyed by all at one step, in force too
when a rank has died, and told by the chronicle."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import driving

EVERY = 20


def test_an_intervention_holds_from_its_step_on_in_every_attempt(tmp_path: Path) -> None:
    process = driving.start(
        tmp_path, "train.steps=100000", f"checkpoint.every_steps={EVERY}", "optim.decay_steps=1000"
    )
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= EVERY + 5, 120, process, tmp_path)
        asked = subprocess.run(
            driving.command(
                *("intervene", str(run.path), "lr_scale=0.25", "clip=0.5", "skip_batches=3"),
                *("--why", "the gradient norm climbs"),
            ),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert asked.returncode == 0, asked.stderr
        assert "asked run to train with lr_scale=0.25, clip=0.5, skip_batches=3" in asked.stdout
        driving.wait_for(
            lambda: len(driving.of_kind(run, "order_ended")) == 3, 60, process, tmp_path
        )
        given, ended = driving.of_kind(run, "order_given"), driving.of_kind(run, "order_ended")
        assert [(g.event.order, dict(g.event.parameters)) for g in given] == [
            ("scale_lr", {"factor": 0.25}),
            ("set_clip", {"clip": 0.5}),
            ("skip_samples", {"samples": 24, "after": 0}),
        ]
        assert {g.event.reason.partition(" (by ")[0] for g in given} == {"the gradient norm climbs"}
        assert {e.event.outcome for e in ended} == {"obeyed"}
        steps = {e.step for e in ended}
        [step] = steps
        assert step is not None

        # From a checkpoint of before the order: the steps up to it are trained as they were.
        os.kill(driving.rank_process(tmp_path, rank=1), signal.SIGKILL)
        driving.wait_for(
            lambda: max(driving.metrics(run).get("1.01", {0: {}})) > step + EVERY,
            120,
            process,
            tmp_path,
        )
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 120) == 75, driving.tail(tmp_path)
        for lines in driving.metrics(run).values():
            for number, line in lines.items():
                batch = number - 1
                whole = 1e-3 + (1e-4 - 1e-3) * (batch - 4) / (1000 - 4)
                factor, left_out = (0.25, 24) if batch >= step else (1, 0)
                if batch >= 5:
                    assert line["lr"] == pytest.approx(whole * factor)
                assert line["samples"] == 8 * number + left_out
        story = (run.chronicle / "chronicle.md").read_text()
        assert "the learning rate times 0.25: The gradient norm climbs (by " in story, story
    finally:
        driving.end(process, tmp_path)


def test_a_run_that_nobody_leads_is_not_changed(tmp_path: Path) -> None:
    process = driving.start(tmp_path, "train.steps=10")
    try:
        assert driving.finish(process, tmp_path, 120) == 0, driving.tail(tmp_path)
    finally:
        driving.end(process, tmp_path)
    run = driving.run_directory(tmp_path).path
    asked = subprocess.run(
        driving.command("intervene", str(run), "clip=0.5", "--why", "x"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert asked.returncode != 0
    assert "nobody leads run, so nothing can be changed" in asked.stderr
    assert not list((run / "inbox").glob("*.json"))
