"""What is asked about a run from outside it must be answered truly, and never with a traceback."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from opt_logbook.record.events import Entry, LineageOpened, NodeJoined, RunCreated, RunStopped
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.verbs import VERBS
from opt_train.config.compose import configs_directory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has begun, with one node."""
    run = RunDirectory(tmp_path / "small")
    run.path.mkdir()
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(Entry(time.time(), "", None, RunCreated("small", 0, "tiny", 1, 10, 1)))
        journal.append(Entry(time.time(), "", None, NodeJoined("node-1", "active", 1)))
    return run


def test_a_request_to_stop_names_who_asked(
    run: RunDirectory, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    with Lock.acquire(run, leader=1):
        assert say("stop", str(run.path)).code == 0
    [letter] = run.inbox.iterdir()
    assert json.loads(letter.read_text())["by"].startswith("ada on ")


def test_a_request_that_cannot_be_left_is_one_sentence_with_another_way(
    run: RunDirectory, say
) -> None:
    run.inbox.write_text("a file where the folder should be")
    with Lock.acquire(run, leader=1):
        said = say("stop", str(run.path))
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "TERM to process" in said.err


def test_a_lone_rank_is_not_asked_by_a_letter_that_nobody_would_read(
    run: RunDirectory, say
) -> None:
    with Lock.acquire(run):
        said = say("stop", str(run.path))
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "obeys signals alone; send TERM to process" in said.err
    assert not run.inbox.exists()


def test_a_file_that_is_no_run_is_one_sentence(tmp_path: Path, say) -> None:
    (tmp_path / "notes.txt").write_text("no run")
    for verb in ("status", "stop", "checkpoints"):
        said = say(verb, str(tmp_path / "notes.txt"))
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)


def test_a_journal_too_damaged_to_tell_is_said_to_be_damaged(run: RunDirectory, say) -> None:
    lines = run.journal.read_bytes().splitlines(keepends=True)
    run.journal.write_bytes(lines[0].replace(b"tiny", b"Tiny") + lines[1])
    said = say("status", str(run.path))
    assert said.code == 2
    assert said.err.startswith(f"opt-train: {run.journal} is damaged (line 1)")


def test_nodes_of_a_run_at_rest_are_not_told_as_working(run: RunDirectory, say) -> None:
    with Lock.acquire(run):
        assert "  nodes: node-1 active\n" in say("status", str(run.path)).out
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(Entry(time.time(), "", None, RunStopped("ada", -1)))
    assert "  nodes at the end: node-1 active\n" in say("status", str(run.path)).out


def test_a_run_that_goes_on_for_more_steps_is_not_told_as_past_its_end(
    run: RunDirectory, say
) -> None:
    """`train.steps=60 lineage=new` on a run of 40 was told as "step 60 of 40"."""
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        for number, difference in enumerate(
            ((), ("train.steps: 10 -> 15",), ("optim.lr: 0.1 -> 0.2",)), 1
        ):
            journal.append(Entry(time.time(), "", None, LineageOpened(number, "c", difference)))
        assert "step 0 of 15" in say("status", str(run.path)).out
        assert json.loads(say("status", str(run.path), "--json").out)["steps"] == 15


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_the_demo_of_the_examples_has_the_checkpoints_they_name(verb: str) -> None:
    demo = yaml.safe_load((configs_directory() / "experiment" / "demo.yaml").read_text())
    named = [
        int(step)
        for example in VERBS[verb].examples
        for step in re.findall(r"--checkpoint (\d+)", example)
    ]
    assert named
    for step in named:
        assert step <= demo["train"]["steps"]
        assert step % demo["checkpoint"]["every_steps"] == 0
