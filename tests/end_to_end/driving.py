"""Drive real runs from the outside, as a person would: start the command, read the run directory,
kill processes."""

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from opt_logbook.record.events import Entry
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

TINY = (
    "model=tiny",
    "model.dropout=0.1",
    "model.vocab_size=512",
    "model.positions=64",
    "data.sequence_length=64",
    "tokenizer.vocab_size=512",
    "data.max_bytes=400000",
    "precision=fp32",
    "cluster=local",
    "cluster.nodes=2",
    "cluster.buffer_nodes=1",
    "train.steps=60",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.threads=1",
    "optim.lr=1e-3",
    "optim.warmup_steps=5",
    "checkpoint.every_steps=10",
    "supervisor.orphan_seconds=20",
)
"""A run of about a minute's worth of small steps on two nodes with one in reserve."""

PATIENCE = 3
"""Waits are given in seconds of a machine that does nothing else; a busy one gets so many times as
many before a test gives up."""
ENDLESS = ("train.steps=100000", "cluster.rank_module=tests.end_to_end.slow_rank")
"""A run that goes on until something ends it."""


@functools.cache
def prepared() -> Path:
    """Where this test process prepares its data: once, for all runs; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="opt-train-prepared-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder / "tiny"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "opt_train.cli.main", *arguments]


def start(
    folder: Path, *overrides: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """`opt-train run` with `TINY` and `overrides`, run directories under `folder`; output goes to
    `folder/output`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            command(
                "run",
                *TINY,
                f"data.directory={prepared()}",
                f"runs={folder / 'runs'}",
                "name=run",
                *overrides,
            ),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )


def run_directory(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "runs" / "run")


def finish(process: subprocess.Popen[str], folder: Path, seconds: float) -> int:
    """Wait for the exit code; a run that takes too long is ended and its output shown."""
    most = PATIENCE * seconds
    try:
        return process.wait(most)
    except subprocess.TimeoutExpired:
        end(process, folder)
        raise AssertionError(f"still running after {most} s:\n{tail(folder)}") from None


def tail(folder: Path) -> str:
    """The end of what the command and the supervisor said."""
    log = run_directory(folder).logs / "supervisor.log"
    parts = [
        path.read_text(errors="replace")[-3000:]
        for path in (folder / "output", log)
        if path.exists()
    ]
    return "\n--\n".join(parts)


def end(process: subprocess.Popen[str], folder: Path) -> None:
    """Leave nothing behind: the supervisor and every process whose command line names this run."""
    if process.poll() is None:
        process.kill()
        process.wait()
    end_processes_of(folder)


def end_processes_of(folder: Path) -> None:
    for _ in range(3):
        for pid in processes_of(folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def processes_of(folder: Path) -> list[int]:
    """Agents name the run directory on their command line; ranks are their children."""
    agents, parents = [], {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            words = (path / "cmdline").read_bytes()
            stat = (path / "stat").read_text()
        except OSError:
            continue
        pid = int(path.name)
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] == "Z":
            continue
        parents[pid] = int(fields[1])
        if str(folder).encode() in words and pid != os.getpid():
            agents.append(pid)
    children = [pid for pid, parent in parents.items() if parent in agents]
    return sorted({*agents, *children})


def entries(run: RunDirectory) -> list[Entry]:
    return list(read(run.journal).entries) if run.journal.exists() else []


def kinds(run: RunDirectory) -> list[str]:
    return [entry.event.kind for entry in entries(run)]


def of_kind(run: RunDirectory, kind: str) -> list[Entry]:
    return [entry for entry in entries(run) if entry.event.kind == kind]


def metrics(run: RunDirectory) -> dict[str, dict[int, dict[str, Any]]]:
    """Attempt to step to line."""
    result: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(run.metrics.glob("*.jsonl")):
        lines = path.read_text().splitlines()
        result[path.stem] = {line["step"]: line for line in map(json.loads, filter(_whole, lines))}
    return result


def _whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


def newest_step(run: RunDirectory) -> int:
    return max((step for lines in metrics(run).values() for step in lines), default=-1)


def wait_for(
    condition: Callable[[], bool], seconds: float, process: subprocess.Popen[str], folder: Path
) -> None:
    """Poll until `condition` holds; the run may not end before."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not condition():
        if process.poll() is not None and not condition():
            raise AssertionError(f"ended with {process.returncode} too early:\n{tail(folder)}")
        if time.monotonic() > deadline:
            end(process, folder)
            raise AssertionError(f"not within {PATIENCE * seconds} s:\n{tail(folder)}")
        time.sleep(0.05)


@dataclass(frozen=True)
class StepTaken:
    """A line that a rank appended to its log when it took a step."""

    time: float
    attempt: str
    generation: int
    step: int
    rank: str


STEP = re.compile(
    r"^(?P<time>\S+) attempt (?P<attempt>\S+) generation (?P<generation>\d+) step (?P<step>\d+) "
)


def steps_taken(run: RunDirectory) -> Iterator[StepTaken]:
    """What the ranks themselves wrote, whoever supervised: the witness of who trained when."""
    for path in sorted(run.logs.glob("*/*/rank*.log")):
        for line in path.read_text(errors="replace").splitlines():
            match = STEP.match(line)
            if match:
                yield StepTaken(
                    time=datetime.fromisoformat(match["time"]).timestamp(),
                    attempt=match["attempt"],
                    generation=int(match["generation"]),
                    step=int(match["step"]),
                    rank=path.stem,
                )


def rank_process(folder: Path, rank: int) -> int:
    """The pid of the living process whose output a log of `rank` is a copy of.

    A log is copied a moment after it is written: the newest may still be that of a process that has
    ended.
    """
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        for log in run_directory(folder).logs.glob(f"*/*/rank{rank}.log"):
            copied = log.read_bytes()
            for pid in processes_of(folder) if copied else ():
                output = Path(f"/proc/{pid}/fd/1")
                with contextlib.suppress(OSError):
                    if output.resolve() != log.resolve() and output.read_bytes().startswith(copied):
                        return pid
        time.sleep(0.1)
    raise AssertionError(f"no living process writes a log of rank {rank}")


def started_at(pid: int) -> float:
    """Unix seconds at which the process began, to about a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
