"""`opt-train train` keeps the same record as a supervised run, and resumes from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from opt_logbook.record import metrics
from opt_logbook.record.events import AttemptStarted, CheckpointCommitted, CheckpointRejected
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

from tests.command import SMALL, say_apart, start
from tests.train.forked import Forked


def losses(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics.read(run).lines}


@pytest.fixture(scope="module")
def finished(prepared_once: Path) -> RunDirectory:
    """A run that went through without a break."""
    done = say_apart(prepared_once, "train", *SMALL, "name=whole")
    assert done.code == 0, done.err
    assert "whole: finished" in done.out
    return RunDirectory(prepared_once / "runs" / "whole")


def test_a_lone_run_leaves_the_record_that_a_supervised_one_does(
    finished: RunDirectory, say
) -> None:
    reading = read(finished.journal)
    kinds = [entry.event.kind for entry in reading.entries]
    assert reading.damaged == ()
    assert kinds[:4] == ["run_created", "lineage_opened", "attempt_started", "in_force"]
    assert kinds[-2:] == ["attempt_ended", "run_finished"]
    assert kinds.count("checkpoint_committed") == 3
    assert sorted(losses(finished)) == list(range(1, 13))

    told = json.loads(say("status", str(finished.path), "--json").out)
    assert (told["stage"], told["step"], told["incidents"]) == ("finished", 12, [])
    listed = json.loads(say("checkpoints", str(finished.path), "--json").out)
    assert [(one["step"], one["state"]) for one in listed] == [
        (4, "good"),
        (8, "good"),
        (12, "good"),
    ]
    assert all((finished.path / one["path"] / "manifest.json").exists() for one in listed)
    assert say("stop", str(finished.path)).code == 1


def test_a_finished_run_prints_its_summary_again_and_trains_no_more(
    finished: RunDirectory, prepared_once: Path
) -> None:
    before = finished.journal.read_bytes()
    for verb in ("train", "run"):
        again = say_apart(prepared_once, verb, *SMALL, "name=whole")
        assert again.code == 0, again.err
        assert again.out.startswith("whole: finished\n")
    assert finished.journal.read_bytes() == before


def test_a_note_does_not_reopen_a_finished_run(prepared_once: Path, finished: RunDirectory) -> None:
    """It was supervised once more, and refused after an update of the code, though nothing was left
    to compute."""
    drop = [sys.executable, "-m", "opt_logbook.cli", "note", str(finished.path), "well done"]
    subprocess.run(drop, check=True, capture_output=True)
    before = finished.journal.read_bytes()
    again = say_apart(prepared_once, "run", *SMALL, "name=whole")
    assert (again.code, again.out.partition("\n")[0]) == (0, "whole: finished")
    assert finished.journal.read_bytes() == before
    assert "supervisor.log" not in [path.name for path in finished.logs.glob("*")]


def start_and_wait_for_step(workplace: Path, step: int, *words: str) -> Forked:
    with (workplace / "output").open("ab") as output:
        process = start(
            workplace, "train", *SMALL, "train.steps=4000", *words, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 90
    run = RunDirectory(workplace / "runs" / "small")
    while max(losses(run), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.05)
    return process


def test_ctrl_c_saves_and_the_same_command_goes_on(workplace: Path) -> None:
    process = start_and_wait_for_step(workplace, 5)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 75, (workplace / "output").read_text()
    run = RunDirectory(workplace / "runs" / "small")
    assert read(run.journal).entries[-1].event.kind == "run_stopped"
    saved = max(entry.step or 0 for entry in read(run.journal).entries)

    process = start_and_wait_for_step(workplace, saved + 2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    starts = [e for e in read(run.journal).entries if isinstance(e.event, AttemptStarted)]
    assert [(e.attempt, e.step) for e in starts] == [("1.00", 0), ("1.01", saved)]


def test_a_killed_run_resumes_from_the_newest_good_checkpoint_with_the_same_losses(
    workplace: Path, finished: RunDirectory
) -> None:
    process = start_and_wait_for_step(workplace, 9, "optim.decay_steps=12")
    run = RunDirectory(workplace / "runs" / "small")
    deadline = time.monotonic() + 60
    while sum(isinstance(e.event, CheckpointCommitted) for e in read(run.journal).entries) < 2:
        assert time.monotonic() < deadline, (
            "saves are committed while training goes on, but they are"
        )
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    # The newest checkpoint is damaged: attempt 1.01 finds that as it reads it, and 1.02 goes on
    # with the one before. A later folder may be there too, of the save that the kill interrupted.
    newest = (
        run.path
        / [
            e.event.path
            for e in read(run.journal).entries
            if isinstance(e.event, CheckpointCommitted)
        ][-1]
    )
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    process = start_and_wait_for_step(workplace, 0, "optim.decay_steps=12")
    deadline = time.monotonic() + 60
    while not (
        run.metrics_of("1.02").exists() and run.metrics_of("1.02").read_text().count("\n") > 6
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=60)

    entries = read(run.journal).entries
    [rejected] = [e.event for e in entries if isinstance(e.event, CheckpointRejected)]
    assert rejected.path == str(newest.relative_to(run.path))
    assert f"{shard.name} has a wrong checksum" in rejected.why
    restart = [e for e in entries if isinstance(e.event, AttemptStarted)][-1]
    assert isinstance(restart.event, AttemptStarted)
    assert (restart.step or 0) % 4 == 0
    assert restart.step != int(newest.name.removeprefix("step-"))
    # The uninterrupted run has the same schedule: decay over 12 steps, warm-up of 2.
    by_attempt: dict[str, dict[int, float]] = {"1.00": {}, "1.02": {}}
    for line in metrics.read(run).lines:
        by_attempt[line["attempt"]][line["step"]] = line["loss"]
    common = by_attempt["1.00"].keys() & by_attempt["1.02"].keys()
    assert common
    assert all(by_attempt["1.00"][step] == by_attempt["1.02"][step] for step in common)
    whole = losses(finished)
    assert all(
        by_attempt["1.00"][step] == whole[step] for step in whole if step in by_attempt["1.00"]
    )


def test_a_reader_that_leaves_ends_nothing(workplace: Path) -> None:
    """As `| head` does: the first validation ended the run, unsaved and with code 0."""
    reading, writing = os.pipe()
    errors = workplace / "errors"
    with open(reading) as reader, errors.open("wb") as complaints:
        with open(writing, "wb") as output:
            process = start(
                workplace,
                *("train", *SMALL, "train.validate_every=4"),
                stdout=output,
                stderr=complaints,
            )
        assert reader.readline() == "attempt 1.00: from the beginning\n"
    assert process.wait(timeout=60) == 0, errors.read_text()
    entries = read(RunDirectory(workplace / "runs" / "small").journal).entries
    assert entries[-1].event.kind == "run_finished"


def test_changed_training_keys_open_a_lineage_only_when_asked(
    workplace: Path, finished: RunDirectory
) -> None:
    # A copy, because the lineage would otherwise be opened in the run that other tests read.
    run = RunDirectory(workplace / "runs" / "small")
    shutil.copytree(finished.path, run.path)
    refused = say_apart(workplace, "train", *SMALL, "train.steps=16")
    assert refused.code == 2
    assert "train.steps: 12 -> 16" in refused.err
    done = say_apart(workplace, "train", *SMALL, "train.steps=16", "lineage=new")
    assert done.code == 0, done.err
    starts = [e for e in read(run.journal).entries if isinstance(e.event, AttemptStarted)]
    assert [(e.attempt, e.step) for e in starts] == [("1.00", 0), ("2.00", 12)]
    opened = [e.event for e in read(run.journal).entries if e.event.kind == "lineage_opened"]
    assert [event.difference for event in opened] == [(), ("train.steps: 12 -> 16",)]
    assert {p.name for p in (run.path / "code").iterdir()} == {"1", "2"}


@pytest.mark.slow
def test_two_ranks_under_torchrun_share_one_record(workplace: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "opt_train.cli.main", "train", *SMALL],
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunDirectory(workplace / "runs" / "small")
    assert sorted(losses(run)) == list(range(1, 13))
    assert done.stdout.count("small: finished") == 1
    [started] = [e.event for e in read(run.journal).entries if isinstance(e.event, AttemptStarted)]
    assert started.world_size == 2
