"""``python -m opt_train.burn_in.node --run DIR --node NAME``: everything that is tested of one node
by itself, printed as one JSON object.

Each instrument is a child that may hang and is killed at the deadline: a sick GPU or a dead file
system must not keep the others from being reported. This program itself imports no torch.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.burn_in.config import BurnInConfig
from opt_train.burn_in.results import (
    BurnInResult,
    BurnInTest,
    NodeReport,
    report_line,
    results_of,
)
from opt_train.burn_in.verdict import judged
from opt_train.config.run_config import RunConfig, from_json
from opt_train.diagnosis.causes import Cause, StorageDetail
from opt_train.host import signals
from opt_train.host.children import KillableChild, ProgramEnd

REPORT_SECONDS = 5.0
"""Of the time for all tests, what is left for killing and reporting."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """A test program, and what it means if it does not come to its end."""

    command: tuple[str, ...]
    test: BurnInTest
    part: str
    cause: Cause
    detail: str = ""


def main(arguments: list[str]) -> int:
    """Print the node's report."""
    signals.ignore()
    parser = argparse.ArgumentParser(prog="python -m opt_train.burn_in.node")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--node", required=True)
    given = parser.parse_args(arguments)
    run = RunDirectory(given.run.resolve())
    config = from_json(run.config_json)
    shared = run.nodes / given.node
    run.make_folder(shared)
    # The deadline of all is one: a slow disk does not add to a slow GPU.
    found = [
        cores(_threads(config)),
        *measure(instruments(config, given.node, shared), config.burn_in.seconds),
    ]
    results = tuple(judged(result, config.burn_in) for result in found)
    print(report_line(NodeReport(given.node, time.time(), results)))
    return 0


def instruments(config: RunConfig, node: str, shared: Path) -> list[Instrument]:
    """The programs to start on this node; `shared` is a folder on the file system of the run."""
    burn_in, slots = config.burn_in, config.cluster.slots_per_node
    on_cpu = config.train.device == "cpu"
    programs = [
        Instrument(
            _device_command(config, slot),
            BurnInTest.MATMUL,
            f"slot {slot}",
            # A CPU that does not come to its end has too much else to do; a GPU hangs.
            Cause.UNKNOWN if on_cpu else Cause.GPU_FAULT,
        )
        for slot in range(slots)
    ]
    disk = config.checkpoint.node_directory or _temporary_folder()
    if burn_in.file_bytes:
        programs += [
            Instrument(
                _storage_command(BurnInTest.DISK, Path(disk), node, burn_in),
                BurnInTest.DISK,
                disk,
                Cause.STORAGE,
                StorageDetail.NODE_DISK,
            ),
            Instrument(
                _storage_command(BurnInTest.SHARED, shared, node, burn_in),
                BurnInTest.SHARED,
                str(shared),
                Cause.STORAGE,
            ),
        ]
    return programs


def _threads(config: RunConfig) -> int:
    """Of each rank on this node."""
    cluster = config.cluster
    ranks = cluster.ranks_per_machine(cluster.nodes * cluster.slots_per_node)
    return config.train.threads or max(1, len(os.sched_getaffinity(0)) // ranks)


def _device_command(config: RunConfig, slot: int) -> tuple[str, ...]:
    burn_in, threads = config.burn_in, str(_threads(config))
    return (
        *(sys.executable, "-P", "-m", "opt_train.burn_in.device"),
        *("--device", config.train.device, "--slot", str(slot), "--threads", threads),
        *("--matmul-size", str(burn_in.matmul_size)),
        *("--matmul-seconds", str(burn_in.matmul_seconds)),
        *("--gpu-memory-share", str(burn_in.gpu_memory_share)),
        *("--host-memory-bytes", str(burn_in.host_memory_bytes)),
    )


def _storage_command(
    test: BurnInTest, folder: Path, node: str, burn_in: BurnInConfig
) -> tuple[str, ...]:
    return (
        *(sys.executable, "-P", "-m", "opt_train.burn_in.storage", "--test", test),
        # One name a node, so that a test that was killed leaves one file and the next removes it.
        *("--folder", str(folder), "--file", f".opt-train-burn-in-{node}"),
        *("--bytes", str(burn_in.file_bytes)),
    )


def measure(programs: Sequence[Instrument], seconds: float) -> Iterator[BurnInResult]:
    """What all of them found, side by side; one that has not ended in `seconds` has failed."""
    deadline = time.monotonic() + max(1.0, seconds - REPORT_SECONDS)
    started: list[tuple[Instrument, KillableChild | OSError]] = []
    for program in programs:
        try:
            started.append((program, KillableChild(program.command)))
        except OSError as error:
            started.append((program, error))
    for program, child in started:
        if isinstance(child, OSError):
            yield _failed(program, f"cannot be started: {child.strerror}", Cause.UNKNOWN)
        else:
            yield from read_end(program, child.ended_by(deadline), seconds)


def read_end(program: Instrument, end: ProgramEnd, seconds: float) -> Iterator[BurnInResult]:
    """What the program printed, or that it failed: how it ended is a result too."""
    # Only of one that says itself that it is done: a partial output proves nothing.
    if end.code == 0:
        try:
            yield from results_of(end.output)
            return
        except ValueError as error:
            yield _failed(program, str(error), Cause.UNKNOWN)
            return
    if end.code is None:
        yield _failed(program, f"it has not ended within {seconds:g} s", program.cause)
        return
    how = signals.signal_name(-end.code) if end.code < 0 else f"exit code {end.code}"
    words = f": {end.last_words}" if end.last_words else ""
    yield _failed(program, f"it ended with {how}{words}", program.cause)


def _failed(program: Instrument, why: str, cause: Cause) -> BurnInResult:
    failed = BurnInResult(program.test, program.part, trouble=f"{program.part}: {why}", cause=cause)
    return replace(failed, detail=program.detail) if cause is program.cause else failed


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # Python writes to it to find out: on a full disk there is none
        return os.environ.get("TMPDIR", "/tmp")  # noqa: S108 - to be tested, not to be trusted


def cores(threads: int) -> BurnInResult:
    """How many of its cores a program may use here, and `threads` a rank with them."""
    usable = len(os.sched_getaffinity(0))
    return BurnInResult(
        BurnInTest.CORES,
        value=usable,
        unit="cores",
        remark=f"{os.cpu_count()} in the machine, {threads} threads a rank",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
