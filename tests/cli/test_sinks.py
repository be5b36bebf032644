"""Invariant 10 for metrics services: whatever one does, the run computes the same, to the bit, and
ends in time.

The services here are packages of their names that misbehave on purpose, and a run is a lone one in
a process of its own.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record import metrics
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli import run as cli_run
from opt_train.config.compose import compose
from opt_train.config.run_config import RunConfig
from opt_train.supervisor.shell import start as shell
from tests.command import SMALL, say_apart

FLUSH_SECONDS = 1.0
OVERHEAD_SECONDS = 20.0
"""That a run with a sink may take longer than one without, on a machine that does other things
too."""

WELL = """
class Settings:
    def __init__(self, **ignored): pass
class Run:
    def define_metric(self, *a, **k): pass
    def log(self, values, step): {at_log}
    def finish(self): {at_finish}
def init(**ignored): return Run()
"""

STOPPED = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
RAISES = "raise RuntimeError('no service today')"
KILLED = "import os; os.kill(os.getpid(), 9)"
BLOCKS = WELL.format(
    at_log="import time; time.sleep(1e6)", at_finish="import time; time.sleep(1e6)"
)

TROUBLES = {
    "stopped-and-raises": (STOPPED, RAISES, "the tensorboard sink ended early (exit code 1)"),
    "blocks-and-killed": (BLOCKS, KILLED, "the tensorboard sink ended early (SIGKILL)"),
}
"""What happens to W&B's sink and to TensorBoard's beside it, as sources of the packages, and what
is said of it."""


def train(folder: Path, name: str, *words: str, path: Path | None = None) -> tuple[str, float]:
    """What a lone run says on standard error, and its seconds."""
    began = time.monotonic()
    # Of its processes the sinks are started anew, and find the packages.
    found = {"PYTHONPATH": str(path)} if path else {}
    done = say_apart(folder, "train", *SMALL, f"name={name}", *words, environment=found)
    assert done.code == 0, done.err
    return done.err, time.monotonic() - began


def losses(folder: Path, name: str) -> list[tuple[object, object, object]]:
    lines = metrics.read(RunDirectory(folder / "runs" / name)).lines
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def without(prepared_once: Path) -> float:
    """Trains without sinks, as `without`; its seconds."""
    return train(prepared_once, "without")[1]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_sink_in_trouble_changes_nothing(
    trouble: str, prepared_once: Path, tmp_path: Path, without: float
) -> None:
    *sources, told = TROUBLES[trouble]
    for package, source in zip(("wandb", "tensorboard"), sources, strict=True):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(source)
    both = ("sinks.wandb=true", "sinks.tensorboard=true", f"sinks.flush_seconds={FLUSH_SECONDS}")
    said, seconds = train(prepared_once, trouble, *both, path=tmp_path)
    assert losses(prepared_once, trouble) == losses(prepared_once, "without")
    assert len(losses(prepared_once, trouble)) == 12
    assert told in said
    assert "wandb" not in said, "nobody knows that it is stuck, and nobody waits to find out"
    assert seconds < without + FLUSH_SECONDS + OVERHEAD_SECONDS
    assert sinks_of(prepared_once / "runs" / trouble) == [], "none is left behind"
    log = prepared_once / "runs" / trouble / "logs" / "sinks.log"
    assert ("no service today" in log.read_text()) == (trouble == "stopped-and-raises")


def test_a_supervised_run_feeds_its_sinks_too(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor itself is replaced: what is tried is when `run` starts its sinks, and that it
    ends them."""
    pytest.importorskip("tensorboard")

    def supervise(
        config: RunConfig,
        run: RunDirectory,
        _created: object,
        write_configuration: Callable[[], None],
        **_: object,
    ) -> int:
        assert not run.path.joinpath("sinks").exists()
        write_configuration()
        with MetricsWriter(run) as writer:
            writer.append("1.00", {"step": 1, "time": 1e9, "loss": 2.5})
        return 0

    monkeypatch.setattr(shell, "supervise", supervise)
    config = compose((*SMALL, "sinks.tensorboard=true", "sinks.flush_seconds=60"))
    assert cli_run.run_supervised(config, prepare=lambda: 0) == 0
    run = Path(config.runs, config.name)
    assert json.loads((run / "sinks" / "tensorboard.json").read_text()) == {
        "attempt": "1.00",
        "step": 1,
        "sent": 1,
    }
    assert len(list((run / "sinks" / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert sinks_of(run.absolute()) == []


def sinks_of(run: Path) -> list[int]:
    """Processes that forward this run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"opt_train.sinks" in words and str(run).encode() in words:
            found.append(int(entry.name))
    return found
