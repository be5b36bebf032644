"""`--help` must answer at once, `run` must never load torch, and a multirun must keep its jobs
apart."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from opt_logbook.record.journal import read

from opt_train.cli import jobs
from opt_train.cli import main as cli
from opt_train.protocol.exits import TERMINATED
from tests import command

SMALL = (*command.SMALL, "train.steps=4")


def imports_of(statement: str) -> set[str]:
    code = (
        f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in "
        "sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = imports_of("from opt_train.cli.main import main; main(['--help'])")
    assert not loaded & {"torch", "numpy", "hydra", "datasets", "matplotlib"}


def test_a_supervisors_process_never_loads_torch() -> None:
    loaded = imports_of(
        "import opt_train.cli.run, opt_train.supervisor.shell.start, opt_train.config.compose "
        "as c; c.compose([])"
    )
    assert not loaded & {"torch", "datasets", "tokenizers", "pandas", "pyarrow"}


def test_help_answers_at_once() -> None:
    """By the measure of this machine as it is now: how long does Python take to start with a
    parser?"""

    def seconds(*arguments: str) -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.monotonic() - began

    # By turns, so that a busy machine is busy for both; the fastest of each, so that its moods are
    # no finding.
    bare, ours = zip(
        *[
            (seconds("-c", "import argparse"), seconds("-m", "opt_train.cli.main", "--help"))
            for _ in range(7)
        ],
        strict=True,
    )
    assert min(ours) < 3 * min(bare) + 0.1, (
        f"{min(ours):.2f} s, where Python alone takes {min(bare):.2f} s"
    )


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"opt-train {verb}" in text
    assert "exit codes:" in text


def test_cfg_prints_the_resolved_configuration_and_starts_nothing(
    tmp_path, monkeypatch, say
) -> None:
    monkeypatch.chdir(tmp_path)
    said = say("run", "optim.lr=1e-3", "--cfg", "job", "experiment=demo", "seed=7")
    assert (said.code, said.err) == (0, "")
    printed = yaml.safe_load(said.out)
    assert (printed["name"], printed["seed"], printed["optim"]["lr"]) == ("demo", 7, 0.001)
    assert list(tmp_path.iterdir()) == []


def test_cfg_of_a_multirun_prints_every_job(tmp_path, monkeypatch, say) -> None:
    monkeypatch.chdir(tmp_path)
    said = say(
        "run", "-m", "--cfg", "job", "experiment=demo", "seed=range(0,3)", "optim.lr=1e-3,2e-3"
    )
    jobs = list(yaml.safe_load_all(said.out))
    assert [job["name"] for job in jobs] == [f"demo-{n}" for n in range(6)]
    assert [(job["seed"], job["optim"]["lr"]) for job in jobs] == [
        (s, r) for s in range(3) for r in (1e-3, 2e-3)
    ]


@pytest.mark.slow
def test_a_multirun_is_a_process_and_a_run_directory_a_job(workplace: Path, say) -> None:
    said = say("train", "--multirun", *SMALL, "seed=1,2")
    assert said.code == 0, said.err
    assert said.out.splitlines()[-2:] == ["job 0 small-0: done", "job 1 small-1: done"]
    created = [
        read(workplace / "runs" / name / "journal.jsonl").entries[0].event
        for name in ("small-0", "small-1")
    ]
    assert [event.seed for event in created] == [1, 2]
    assert sorted(p.name for p in (workplace / "runs").iterdir()) == ["small-0", "small-1"]


@pytest.mark.slow
def test_a_failing_job_does_not_keep_the_next_from_running(workplace: Path, say) -> None:
    said = say("train", "--multirun", *SMALL, "data.name=nothing,files")
    assert said.code == 2
    assert said.out.splitlines()[-2:] == ["job 0 small-0: exit 2", "job 1 small-1: done"]


def test_a_term_is_handed_to_the_job_of_a_multirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say
) -> None:
    """A scheduler's TERM reached the parent alone, and the job trained on with nobody to ask about
    it. Here the job is a shell that asks for its own end, until it is heard."""
    job = tmp_path / "job"
    job.write_text(
        "#!/bin/sh\ntrap 'exit 75' TERM\nwhile :; do kill -TERM $PPID; sleep 0.1; done\n"
    )
    job.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(job))
    said = say("train", "--multirun", *SMALL, "seed=1,2")
    assert (said.code, said.out.splitlines()[-2:]) == (
        75,
        ["stopped; the same command goes on with small-0", "job 0 small-0: exit 75"],
    )


@pytest.mark.slow
def test_a_term_ends_a_job_that_trains_with_its_state_saved(workplace: Path) -> None:
    words = ["train", "--multirun", *SMALL, "train.steps=4000", "seed=1,2"]
    with (workplace / "output").open("wb") as out, (workplace / "errors").open("wb") as err:
        process = command.start(workplace, *words, stdout=out, stderr=err)
    journal = workplace / "runs" / "small-0" / "metrics" / "1.00.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (workplace / "output").read_text().splitlines()[-2:] == [
        "stopped; the same command goes on with small-0",
        "job 0 small-0: exit 75",
    ]
    assert (
        read(workplace / "runs" / "small-0" / "journal.jsonl").entries[-1].event.kind
        == "run_stopped"
    )


def test_output_into_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m opt_train.cli.main run --cfg job experiment=demo | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_a_term_while_data_are_prepared_starts_no_further_job(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, say
) -> None:
    begun: list[list[str]] = []

    def ended_by_term(words: list[str]) -> int:
        begun.append(words)
        return TERMINATED

    monkeypatch.setattr(jobs, "call", ended_by_term)
    assert say("run", "--multirun", *SMALL, "seed=1,2").code == 143
    assert len(begun) == 1
