"""`python -m opt_train.sinks RUN_DIRECTORY SINK`: forward a run's metrics lines until standard
input ends.

It only ever reads what the run has written, so whatever happens here (a service that blocks for
ever, a crash, no such package) is nothing to the training. By hand, `... runs/demo tensorboard
</dev/null` forwards all there is and ends.
"""

import argparse
import ctypes
import fcntl
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opt_logbook.record.run_directory import RunDirectory

from opt_train.host import signals
from opt_train.sinks.config import SinksConfig
from opt_train.sinks.metrics_tail import MetricsLine, MetricsTail, Position

SINKS = {
    "wandb": ("opt_train.sinks.wandb_sink", "WandbSink"),
    "tensorboard": ("opt_train.sinks.tensorboard_sink", "TensorBoardSink"),
}
"""Each sink's module and class. A module is imported only where its sink is asked for: its library
may be missing."""

POLL_SECONDS = 1.0
NICENESS = 10
"""Ranks and supervisor go first."""

# linux/prctl.h; Python has no name for it.
_PR_SET_PDEATHSIG = 1


class MetricsSink(Protocol):
    """Somewhere to show metrics."""

    def send(self, line: MetricsLine, number: int) -> None:
        """Take one step's line, the `number`th of the run's life; a line may come twice, with the
        same number."""

    def flush(self) -> None:
        """Return when what was sent would survive this process."""

    def close(self) -> None:
        """Flush, and end."""


def forward(run: RunDirectory, name: str) -> int:
    """Forward from the last forwarded line on, until standard input ends or the run directory is
    gone."""
    configuration = read_configuration(run)
    folder = run.path / "sinks"
    run.make_folder(folder)
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"waiting for another process, which forwards {run.path} to {name} already",
                file=sys.stderr,
            )
            # Waiting is safe: a starter that has come to its end gives its sinks seconds.
            fcntl.flock(lock, fcntl.LOCK_EX)
        state = folder / f"{name}.json"
        tail = MetricsTail(run, Position.read(state))
        module, cls = SINKS[name]
        sink: MetricsSink = getattr(importlib.import_module(module), cls)(
            run, SinksConfig(**configuration.get("sinks", {})), configuration
        )
        ended = False
        while run.path.is_dir():
            before = tail.position
            for line in tail.new_lines():
                sink.send(line, tail.position.sent - 1)
            if tail.position != before:
                sink.flush()
                tail.position.write(state)
            if ended:
                break
            ended = standard_input_ends(POLL_SECONDS)
        sink.close()
    return 0


def read_configuration(run: RunDirectory) -> dict[str, Any]:
    """The run's resolved configuration, by room.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    found = json.loads(run.config_json.read_text())
    if not isinstance(found, Mapping):
        raise ValueError(f"{run.config_json} holds no configuration")
    return dict(found)


def standard_input_ends(within_seconds: float) -> bool:
    """Wait, at most so long; True where whoever started this closed the other end, or is gone."""
    readable, _, _ = select.select([0], [], [], within_seconds)
    return bool(readable) and not os.read(0, 4096)


def die_with_starter() -> None:
    """A starter that is killed takes its sinks along, stopped ones too: none is left behind holding
    files."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    if signals.were_blocked():
        signals.ignore()
    parser = argparse.ArgumentParser(
        prog="python -m opt_train.sinks", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("sink", choices=SINKS, metavar="SINK", help=" or ".join(SINKS))
    flags = parser.parse_args(arguments)
    run = RunDirectory(flags.run.absolute())
    if not run.config_json.exists():
        parser.error(f"{flags.run} is no run directory")
    die_with_starter()
    os.nice(NICENESS)
    return forward(run, flags.sink)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
