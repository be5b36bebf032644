"""From a fault to the end of the first new step: ours, and torchrun's restarts beside it.

    python benchmarks/recovery.py              medians of 3; some ten minutes
    python benchmarks/recovery.py --quick      SIGKILL alone, once

Two ranks of a tiny model on this machine, which is all it says anything about. A fault is an
exception, SIGKILL of a rank, SIGSTOP of a rank, a rank that sleeps for ever, and (ours alone) the
death of a whole node with a buffer node ready. Ours has trained for a while by then and its next
ranks are warm, which takes some 10 s on two cores; torchrun keeps none, so to it all moments are
alike. The clock begins when the fault happens and ends with the first step that had not been done
before. Where a silence must be waited for, both are given the same: `supervisor.minimum_seconds`,
and gloo's timeout.

Ours in phases, by the journal: *detect* until the failure is seen, *settle* until its ranks are
gone and their last words are here, *diagnose* until the attempt has ended, *assemble* until the
next one begins, *start* until its first step is done, *again* until the first new one is. The parts
of a start are as its slowest rank took them.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record import metrics
from opt_logbook.record.events import Entry, InForceReported
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

HERE = Path(__file__).parent
SILENCE_SECONDS = 10.0
FAULTS = ("exception", "SIGKILL", "SIGSTOP", "hang", "node")
QUICK = ("SIGKILL",)
AT_STEP = 30
STEPS = 100_000
"""More than are ever done: the run is stopped once it has recovered."""
PEER_SECONDS = 90.0
"""For all of torchrun's run, which takes some 15."""
USER_TIME, SYSTEM_TIME, START_TIME = 10, 11, 18
"""Places in what `stat_fields` gives."""
AIMS = {"SIGKILL": 2.0, "exception": 2.8, "node": 2.5, "SIGSTOP": 2.0, "hang": 2.0}
"""Seconds; of SIGSTOP and hang after they are detected."""
PHASES = {
    "detect": "failure_seen",
    "settle": "generation_killed",
    "diagnose": "attempt_ended",
    "assemble": "attempt_started",
    "start": "training_began",
}
"""Phase -> the kind of journal line that ends it."""
OVERRIDES = (
    *("model=tiny", "model.vocab_size=512", "model.positions=64", "data.sequence_length=64"),
    *("tokenizer.vocab_size=512", "data.max_bytes=400000", "precision=fp32", "cluster=local"),
    *("cluster.nodes=2", "cluster.buffer_nodes=1", f"train.steps={STEPS}", "train.threads=1"),
    *("train.global_batch=8", "train.micro_batch=4", "optim.warmup_steps=5"),
    *("checkpoint.every_steps=10", f"supervisor.minimum_seconds={SILENCE_SECONDS}"),
    *(f"supervisor.step_seconds={SILENCE_SECONDS}", "name=run"),
)


@dataclass
class Recovery:
    """Seconds, in all and by phase (ours alone)."""

    seconds: float
    phases: dict[str, float]
    start: dict[str, float]
    """The parts of the start."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    rounds = 1 if flags.quick else flags.rounds
    with tempfile.TemporaryDirectory(prefix="recovery-benchmark-") as name:
        folder = Path(name)
        for fault in QUICK if flags.quick else flags.faults:
            mine = [ours(folder / f"{fault}-{n}", folder / "data", fault) for n in range(rounds)]
            theirs = (
                []
                if fault == "node"
                else [peers(folder / f"torchrun-{fault}-{n}", fault) for n in range(rounds)]
            )
            report(fault, mine, theirs)


def in_words(parts: dict[str, float]) -> str:
    return "  ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())


def report(fault: str, mine: list[Recovery], theirs: list[float]) -> None:
    total = statistics.median(r.seconds for r in mine)
    phases = {p: statistics.median(r.phases[p] for r in mine) for p in mine[0].phases}
    start = {p: statistics.median(r.start[p] for r in mine) for p in mine[0].start}
    print(f"{fault:10} ours {total:6.2f} s   {in_words(phases)}   (start: {in_words(start)})")
    if theirs:
        theirs_total = statistics.median(theirs)
        stuck = sum(map(math.isinf, theirs))
        note = f"   ({stuck} of {len(theirs)}: none in {PEER_SECONDS:.0f} s)" if stuck else ""
        print(f"{'':10} torchrun {theirs_total:6.2f} s{note}")
        print(f"{fault} ours/torchrun: {total / theirs_total:.2f}x the time")
    silent = fault in ("SIGSTOP", "hang")
    reached = total - phases["detect"] if silent else total
    after = " after detection" if silent else ""
    print(f"{fault}: {reached:.2f} s{after} (aim: at most {AIMS[fault]} s)", flush=True)


# Ours ---------------------------------------------------------------------------------------------


def ours(folder: Path, data: Path, fault: str) -> Recovery:
    """One run of ours that meets `fault` and recovers."""
    folder.mkdir()
    run = RunDirectory(folder / "runs" / "run")
    by_itself = fault in ("exception", "hang")
    overrides = [*OVERRIDES, f"runs={folder / 'runs'}", f"data.directory={data}"]
    if by_itself:
        overrides.append("cluster.rank_module=troubled_rank")
    environment = {**os.environ, "TROUBLE": fault, "TROUBLE_FOLDER": str(folder)}
    environment |= {"PYTHONPATH": os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "opt_train.cli.main", "run", *overrides],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    try:
        wait_until(lambda: newest_step(run, "1.00") >= AT_STEP and are_warm(run), process)
        at = None if by_itself else break_it(run, fault)
        if by_itself:
            (folder / "now").touch()
            wait_until((folder / "at").exists, process)
        wait_until(lambda: newest_step(run, "1.01") > newest_step(run, "1.00"), process)
        process.send_signal(signal.SIGTERM)  # a planned stop
        process.wait(60)
        return recovery_of(run, float((folder / "at").read_text()) if at is None else at)
    finally:
        process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Return once `condition` holds; ends this benchmark where the run ends before."""
    while not condition():
        if process.poll() is not None:
            sys.exit(f"the run ended with {process.returncode} before it was to")
        time.sleep(0.05)


def break_it(run: RunDirectory, fault: str) -> float:
    """Kill or stop what is to be; returns when."""
    agent = agent_of(run, "node-2")
    pid = agent if fault == "node" else ranks_of(agent)[-1]
    at = time.time()
    os.kill(pid, signal.SIGSTOP if fault == "SIGSTOP" else signal.SIGKILL)
    return at


def agent_of(run: RunDirectory, node: str) -> int:
    """The pid of its agent."""
    return int(json.loads((run.nodes / node / "agent.json").read_text())["pid"])


def ranks_of(agent: int) -> list[int]:
    """The agent's ranks, the one that has trained last: it has used the CPU longest. Its oldest
    child is their fork server."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    _, *ranks = sorted(map(int, children), key=lambda pid: stat_fields(pid)[START_TIME])
    return sorted(ranks, key=cpu_ticks)


def are_warm(run: RunDirectory) -> bool:
    """The next rank of each node has been there for a second."""
    agents = [agent_of(run, path.name) for path in run.nodes.iterdir()]
    before = [ranks_of(agent) for agent in agents]
    time.sleep(1)
    # One trains, and one waits; nodes that stand by have the latter alone.
    return sum(map(len, before)) >= 2 + len(agents) and before == list(map(ranks_of, agents))


def cpu_ticks(pid: int) -> int:
    fields = stat_fields(pid)
    return fields[USER_TIME] + fields[SYSTEM_TIME]


def stat_fields(pid: int) -> list[int]:
    """What of `/proc/PID/stat` stands behind the state."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return list(map(int, fields[1:]))


def newest_step(run: RunDirectory, attempt: str) -> int:
    """That `attempt` has done; 0: none yet."""
    return max((int(line["step"]) for line in metrics.newest_lines(run, attempt, 1)), default=0)


def recovery_of(run: RunDirectory, at: float) -> Recovery:
    """What the journal and the metrics say of the run's one incident, which began at `at`."""
    entries = read(run.journal).entries
    marks = [at, *(ended(entries, kind) for kind in PHASES.values())]
    # The step at hand may have ended just behind the fault: it is done, and not a new one.
    before = newest_step(run, "1.00")
    new = min(
        line["time"] for line in metrics.newest_lines(run, "1.01", STEPS) if line["step"] > before
    )
    phases = {
        phase: end - begin for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False)
    }
    starts = [entry.event for entry in entries if isinstance(entry.event, InForceReported)]
    return Recovery(new - at, {**phases, "again": new - marks[-1]}, dict(starts[1].seconds))


def ended(entries: Sequence[Entry], kind: str) -> float:
    """When the line of `kind` that belongs to the recovery was written."""
    of_kind = [entry.time for entry in entries if entry.event.kind == kind]
    return of_kind[1] if kind in ("attempt_started", "training_began") else of_kind[0]


# torchrun -----------------------------------------------------------------------------------------


def peers(folder: Path, fault: str) -> float:
    """Seconds from the fault to the first new step, under torchrun; infinite where there was none
    within `PEER_SECONDS`."""
    folder.mkdir()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", "--max-restarts=10", "--monitor-interval=0.1"),
                *(str(HERE / "recovery_peer.py"), str(folder), fault, str(SILENCE_SECONDS)),
            ],
            stdout=output,
            stderr=output,
            # With the store shared, as is the default, restarted ranks now and then find the
            # addresses of dead ones in it: it takes some 20 s, or does not end (torch 2.13).
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
        )
    try:
        code = process.wait(PEER_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # which it hands on to its ranks
        process.wait(60)
        return math.inf
    if code != 0:
        sys.exit(f"torchrun ended with {code}:\n{(folder / 'output').read_text()[-2000:]}")
    at = float((folder / "at").read_text())
    steps = [line.split() for line in (folder / "steps").read_text().splitlines()]
    return min(float(when) for step, when in steps if int(step) >= AT_STEP) - at


if __name__ == "__main__":
    main()
