"""The launch script must hand a signal on, wait for the state to be saved, and tell the right exit
code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "one-node.sbatch"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with stand-ins: an `opt-train` that saves slowly when asked to stop, `squeue` and
    `scontrol`.

    `squeue` answers with what the file `state` says, `scontrol` fails as often as there are lines
    in `refusals`.
    """
    program = tmp_path / "opt-train"
    program.write_text(
        f"""#!{sys.executable}
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print(" ".join(sys.argv[1:]), flush=True)
if "wait=yes" in sys.argv:
    time.sleep(60)
sys.exit(next((int(word[5:]) for word in sys.argv if word.startswith("code=")), 0))
"""
    )
    program.chmod(0o755)
    stand_ins = {
        "squeue": f"cat {tmp_path}/state",
        "scontrol": f"if [ -s {tmp_path}/refusals ]; then sed -i 1d {tmp_path}/refusals; exit 1; "
        "fi\n"
        f'echo "$@" >> {tmp_path}/scontrol.log',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING None\n")
    return tmp_path


def start(place: Path, *words: str, job: str = "") -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment["PATH"] = f"{place}:{environment['PATH']}"
    if job:
        environment["SLURM_JOB_ID"] = job
    return subprocess.Popen(
        ["bash", SCRIPT, *words], env=environment, stdout=subprocess.PIPE, text=True, cwd=place
    )


def signalled(process: subprocess.Popen[str], place: Path) -> str:
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    return first + rest


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_without_slurm_it_is_the_command_itself(place: Path, code: int) -> None:
    process = start(place, "experiment=demo", f"code={code}")
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (
        code,
        f"run cluster=local experiment=demo code={code}\n",
    )
    assert not (place / "scontrol.log").exists()


@pytest.mark.parametrize("state", ["RUNNING None", "SIGNALING None", "COMPLETING TimeLimit"])
def test_the_time_limit_saves_and_queues_the_job_again(place: Path, state: str) -> None:
    (place / "state").write_text(f"{state}\n")
    process = start(place, "wait=yes", job="42")
    output = signalled(process, place)
    assert process.returncode == 75
    assert "saved" in output
    assert (place / "scontrol.log").read_text() == "requeue 42\n"


def test_a_cancelled_job_saves_and_is_not_queued_again(place: Path) -> None:
    (place / "state").write_text("COMPLETING None\n")
    process = start(place, "wait=yes", job="42")
    output = signalled(process, place)
    assert process.returncode == 75
    assert "saved" in output
    assert "was cancelled" in output
    assert not (place / "scontrol.log").exists()


def test_a_controller_that_does_not_answer_at_once_is_asked_again(place: Path) -> None:
    (place / "refusals").write_text("busy\n")
    process = start(place, "wait=yes", job="42")
    signalled(process, place)
    assert process.returncode == 75
    assert (place / "scontrol.log").read_text() == "requeue 42\n"


def test_a_signal_without_slurm_saves_and_queues_nothing(place: Path) -> None:
    process = start(place, "wait=yes")
    assert "saved" in signalled(process, place)
    assert process.returncode == 75
    assert not (place / "scontrol.log").exists()


def test_a_run_that_a_person_stopped_is_not_queued_again(place: Path) -> None:
    process = start(place, "code=75", job="42")
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert not (place / "scontrol.log").exists()


def test_a_missing_command_is_one_sentence(place: Path) -> None:
    environment = {**os.environ, "OPT_TRAIN": "/nowhere/opt-train"}
    done = subprocess.run(
        ["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_the_script_finds_the_real_command(tmp_path: Path) -> None:
    environment = {**os.environ, "OPT_TRAIN": str(Path(sys.executable).with_name("opt-train"))}
    done = subprocess.run(
        ["bash", SCRIPT, "experiment=demo", "--cfg", "job"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kind: local" in done.stdout
