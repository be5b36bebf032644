"""A sink must not outlive its starter, keep it waiting, or fail without a word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.sinks import sink_processes
from opt_train.sinks.config import SinksConfig
from opt_train.sinks.sink_processes import SinkProcesses

STARTER = """
import sys, time
from pathlib import Path
from opt_logbook.record.run_directory import RunDirectory
from opt_train.sinks.config import SinksConfig
from opt_train.sinks.sink_processes import SinkProcesses
sinks = SinkProcesses(RunDirectory(Path(sys.argv[1])), SinksConfig(wandb=True), print)
sinks.start()
print(sinks._running[0][0].pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run directory, and a `wandb` that stops itself when it is imported and says so before."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    source = (
        f"import os, signal\nopen({str(tmp_path / 'stops')!r}, 'w')\nos.kill(os.getpid(), "
        "signal.SIGSTOP)"
    )
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return RunDirectory(tmp_path / "run")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """The process's letter in /proc; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_stopped_sink_dies_with_a_starter_that_was_killed(
    run: RunDirectory, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STARTER, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        wait_for(tmp_path / "stops")
        assert os.getpgid(pid) == pid, "Ctrl-C at the starter's terminal does not reach it"
        starter.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while state_of(pid) not in ("", "Z"):
        assert time.monotonic() < deadline, "the sink lives on"
        time.sleep(0.02)


def test_a_stopped_sink_keeps_its_starter_no_longer_than_it_may(
    run: RunDirectory, tmp_path: Path
) -> None:
    said: list[str] = []
    sinks = SinkProcesses(run, SinksConfig(wandb=True, flush_seconds=0.5), said.append)
    sinks.start()
    wait_for(tmp_path / "stops")
    began = time.monotonic()
    sinks.close()
    assert time.monotonic() - began < 5
    assert said == [], "to end it is what was wanted"
    sinks.close()


def test_a_sink_that_is_not_installed_is_a_sentence(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_processes.importlib.util, "find_spec", lambda _name: None)
    said: list[str] = []
    sinks = SinkProcesses(run, SinksConfig(wandb=True), said.append)
    sinks.start()
    sinks.close()
    assert said == [
        "sinks.wandb=true, but wandb is not installed; training goes on without it; "
        "install it with: pip install 'opt-train[wandb]'"
    ]


def test_a_log_that_cannot_be_written_is_a_sentence(run: RunDirectory) -> None:
    run.logs.write_text("a file where a folder should be")
    said: list[str] = []
    sinks = SinkProcesses(run, SinksConfig(wandb=True), said.append)
    sinks.start()
    sinks.close()
    assert said == [
        "the wandb sink could not be started (File exists); training goes on without it"
    ]
