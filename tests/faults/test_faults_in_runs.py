"""Whole runs on a file system that fails, stalls or lies: training goes on, the journal says why,
no bit differs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.late_files import LATE_SECONDS
from opt_train.checkpoint.manifest import MANIFEST
from tests.end_to_end import driving
from tests.faults.shim import FILLING, KINDS, Rule, Shim, strerror
from tests.train.rig import tensors_in

STEPS, EVERY = 60, 5
LONG = 240
"""Steps of a run that must outlast three seconds of trouble, however fast the machine."""
SMALL = (
    f"train.steps={STEPS}",
    f"checkpoint.every_steps={EVERY}",
    "cluster.buffer_nodes=0",
    "model.d_model=32",
    "model.ffn=64",
)
pytestmark = pytest.mark.slow  # half a minute each, on two cores

SUPERVISOR = "opt_train.cli.main"
"""A part of the command line that its process alone has."""


@dataclass
class Disturbed:
    """A run under the shim."""

    folder: Path
    shim: Shim
    process: subprocess.Popen[str]

    @property
    def run(self) -> RunDirectory:
        return driving.run_directory(self.folder)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        driving.wait_for(condition, seconds, self.process, self.folder)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: driving.newest_step(self.run) >= step)

    def wait_for_commit(self, step: int) -> Any:
        """The journal's entry."""
        self.wait_for(lambda: step in self.committed())
        return self.committed()[step]

    def committed(self) -> dict[int, Any]:
        return {
            entry.step: entry.event for entry in driving.of_kind(self.run, "checkpoint_committed")
        }

    def newest_commit(self) -> int:
        """Its step."""
        return max(self.committed())

    def events(self, kind: str) -> list[Any]:
        return [entry.event for entry in driving.of_kind(self.run, kind)]

    def ends(self, seconds: float = 150, code: int = 0) -> None:
        assert driving.finish(self.process, self.folder, seconds) == code, driving.tail(self.folder)

    def final(self) -> dict[str, Any]:
        """Weights and moments of the last step, from a checkpoint that verifies."""
        last = self.committed()[self.newest_commit()]
        manifests.verify(self.run.path / last.path, last.manifest_sha256)
        return tensors_in(self.run.path / last.path)


@pytest.fixture
def start(shim: Shim, tmp_path: Path) -> Iterator[Callable[..., Disturbed]]:
    """Starts the run, or goes on with it; nothing of it outlives the test."""
    started: list[Disturbed] = []

    def start_it(*overrides: str) -> Disturbed:
        process = driving.start(
            tmp_path / "disturbed", *SMALL, *overrides, environment=shim.environment
        )
        started.append(Disturbed(tmp_path / "disturbed", shim, process))
        return started[-1]

    yield start_it
    for each in started:
        driving.end(each.process, each.folder)


@dataclass(frozen=True)
class Undisturbed:
    """What a run in peace comes to."""

    final: dict[str, Any]
    retired: list[int | None]


@pytest.fixture(scope="module")
def peace(fault_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(fault_library, tmp_path_factory.mktemp("peace"))


@pytest.fixture(scope="module")
def long_peace(fault_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(fault_library, tmp_path_factory.mktemp("long-peace"), f"train.steps={LONG}")


def undisturbed(fault_library: Path, folder: Path, *overrides: str) -> Undisturbed:
    shim = Shim(fault_library, folder / "shim")
    run = Disturbed(folder, shim, driving.start(folder, *SMALL, *overrides))
    try:
        run.ends()
    finally:
        driving.end(run.process, folder)
    return Undisturbed(
        run.final(), [entry.step for entry in driving.of_kind(run.run, "checkpoint_retired")]
    )


def verify(run: RunDirectory) -> None:
    """Every line of the journal is whole and in its place."""
    command = [sys.executable, "-m", "opt_logbook.cli", "verify", str(run.path)]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_a_save_that_a_full_disk_ends_is_on_record_and_costs_nothing_else(
    start: Callable[..., Disturbed], shim: Shim, peace: Undisturbed
) -> None:
    faults = {
        10: ("ENOSPC", "write", "shard-00002*", "No space left on device"),
        20: ("EDQUOT", "rename", MANIFEST, "Disk quota exceeded"),
        30: ("EIO", "sync", "state.json", "Input/output error"),
        40: ("ESTALE", "create", "shard-00001*", "Stale file handle"),
    }
    shim.set(
        *(
            Rule(fault, f"*/step-{step:08d}/{name}", (call,))
            for step, (fault, call, name, _) in faults.items()
        )
    )
    run = start()
    run.ends()
    assert len(shim.fired()) == len(faults)
    abandoned = {entry.step: entry.event for entry in driving.of_kind(run.run, "save_abandoned")}
    assert sorted(abandoned) == sorted(faults)
    for step, (_, _, name, reason) in faults.items():
        assert reason in abandoned[step].why, abandoned[step]
        assert name.rstrip("*") in abandoned[step].why, abandoned[step]
        assert not (run.run.path / abandoned[step].path).exists()
    assert sorted(run.committed()) == [
        step for step in range(EVERY, STEPS + 1, EVERY) if step not in faults
    ]
    assert run.events("failure_seen") == []
    assert run.final() == peace.final


@pytest.mark.parametrize(
    ("fault", "calls"), [("ENOSPC", FILLING), ("EIO", KINDS)], ids=["full", "gone"]
)
def test_a_run_directory_that_cannot_be_used_for_a_while_is_made_up_for(
    start: Callable[..., Disturbed],
    shim: Shim,
    long_peace: Undisturbed,
    fault: str,
    calls: tuple[str, ...],
) -> None:
    """Journal, metrics, checkpoints and logs alike: decisions wait, and nothing is missing from the
    record."""
    run = start(f"train.steps={LONG}")
    run.wait_for_step(8)
    shim.set(Rule(fault, f"{run.run.path}/*", calls, times=0))
    # On a slow machine nothing is due for the journal for a while.
    run.wait_for(lambda: any("journal." in Path(fired.path).name for fired in shim.fired()))
    time.sleep(3)
    shim.set()
    run.ends()
    for event in run.events("save_abandoned"):
        assert strerror(fault) in event.why
    assert run.events("failure_seen") == []
    assert max((event.seconds for event in run.events("journal_stalled")), default=0) > 1
    assert run.newest_commit() == LONG
    verify(run.run)
    assert run.final() == long_peace.final


@pytest.mark.parametrize(("what", "seconds"), [("checkpoints", 20.0), ("the run directory", 30.0)])
def test_a_file_system_that_stands_still_is_waited_for(
    start: Callable[..., Disturbed], shim: Shim, peace: Undisturbed, what: str, seconds: float
) -> None:
    """Ranks train on meanwhile, until the next save is due, and that has longer."""
    run = start()
    run.wait_for_step(30)
    path = run.run.checkpoints if what == "checkpoints" else run.run.path
    shim.set(Rule("stall", f"{path}/*", seconds=seconds))
    run.ends(150 + seconds)
    assert shim.fired()
    assert run.events("failure_seen") == []
    assert run.events("attempt_ended")[-1].outcome == "finished"
    waited = [*run.committed().values(), *run.events("journal_stalled")]
    assert max(event.seconds for event in waited) > seconds / 2, (
        "whatever met it says how long it took"
    )
    assert run.final() == peace.final


def test_a_checkpoint_that_cannot_be_read_at_a_restart_is_passed_over_for_good(
    start: Callable[..., Disturbed], shim: Shim, peace: Undisturbed
) -> None:
    """And stays so, though its step is higher than that of every checkpoint on the chain that goes
    on."""
    run = start()
    path = run.wait_for_commit(15).path
    shim.set(Rule("EIO", f"*/{path}/shard*", ("read",), times=0))
    os.kill(driving.rank_process(run.folder, rank=1), signal.SIGKILL)
    run.wait_for(lambda: len(run.events("training_began")) == 2)
    shim.set()
    os.kill(driving.rank_process(run.folder, rank=0), signal.SIGKILL)
    run.ends()
    rejected = run.events("checkpoint_rejected")
    assert "Input/output error" in rejected[0].why
    assert "shard-0000" in rejected[0].why
    # One attempt finds it: its ranks are the first who read it. Later ones are not given it again.
    found, *later = [event.checkpoint for event in run.events("attempt_started")[1:]]
    assert found == path
    assert len(later) == 2
    assert path not in later
    assert run.final() == peace.final


def test_a_stale_handle_at_a_restart_loses_no_checkpoint(
    start: Callable[..., Disturbed], shim: Shim, peace: Undisturbed
) -> None:
    run = start()
    path = run.wait_for_commit(15).path
    shim.set(Rule("ESTALE", "*/checkpoints/*.safetensors", ("open", "read"), times=2))
    os.kill(driving.rank_process(run.folder, rank=0), signal.SIGKILL)
    run.ends()
    assert len(shim.fired()) == 2
    assert run.events("checkpoint_rejected") == []
    assert step_of(run.events("attempt_started")[1].checkpoint) >= step_of(path)
    assert run.final() == peace.final


@pytest.mark.parametrize("seconds", [LATE_SECONDS - 2.0, 60.0])
def test_a_manifest_that_ranks_see_late_costs_steps_and_nothing_else(
    start: Callable[..., Disturbed], shim: Shim, peace: Undisturbed, seconds: float
) -> None:
    """The supervisor, whose node renamed it, has checked it, and the ranks cannot see it: they
    wait a while for it."""
    shim.set(Rule("late", f"*/step-{15:08d}/{MANIFEST}", ("rename",), seconds=seconds))
    run = start()
    path = run.wait_for_commit(15).path
    os.kill(driving.rank_process(run.folder, rank=1), signal.SIGKILL)
    run.ends(240)
    begun = [event.checkpoint for event in run.events("attempt_started")]
    assert begun[1] == path, "the rank was not killed before the next commit"
    supervisor = run.process.pid
    assert {fired.pid == supervisor for fired in shim.fired() if fired.fault == "late"} == {
        True,
        False,
    }
    rejected = run.events("checkpoint_rejected")
    if seconds < LATE_SECONDS:
        assert not rejected
        assert len(begun) == 2
    else:
        assert ["manifest.json is missing" in event.why for event in rejected] == [True]
        assert step_of(begun[2]) < 15
    assert run.final() == peace.final


def step_of(path: str) -> int:
    return int(path.rpartition("-")[2])


def test_a_clock_that_jumps_retires_nothing_and_times_nobody_out(
    start: Callable[..., Disturbed], shim: Shim, peace: Undisturbed
) -> None:
    """Two hours ahead, two hours behind, and right again, for the supervisor alone."""
    run = start()
    for step, hours in ((8, 2), (22, -2), (38, 0)):
        run.wait_for_step(step)
        shim.set(Rule("jump", "*", ("clock",), seconds=3600.0 * hours, process=SUPERVISOR))
    run.ends()
    times = [entry.time for entry in driving.entries(run.run)]
    assert max(times) - min(times) > 2 * 3600, "the clock of the journal has jumped"
    assert [entry.step for entry in driving.of_kind(run.run, "checkpoint_retired")] == peace.retired
    assert run.events("failure_seen") == []
    assert run.events("journal_stalled") == []
    verify(run.run)
    assert run.final() == peace.final


def test_a_checkpoint_of_another_configuration_in_the_place_of_a_good_one_is_rejected(
    start: Callable[..., Disturbed], tmp_path: Path, peace: Undisturbed
) -> None:
    """Whole and good, and of other weights: its manifest is not the one in the journal."""
    foreign = driving.start(tmp_path / "foreign", *SMALL, "seed=8", "train.steps=10")
    assert driving.finish(foreign, tmp_path / "foreign", 120) == 0
    *_, theirs = driving.of_kind(
        driving.run_directory(tmp_path / "foreign"), "checkpoint_committed"
    )
    run = start()
    run.wait_for_commit(10)
    run.process.send_signal(signal.SIGINT)
    run.ends(60, code=75)
    *_, before, newest = (event.path for _, event in sorted(run.committed().items()))
    shutil.rmtree(run.run.path / newest)
    shutil.copytree(
        driving.run_directory(tmp_path / "foreign").path / theirs.event.path, run.run.path / newest
    )
    manifests.verify(run.run.path / newest)
    run = start()
    run.ends()
    [rejected] = run.events("checkpoint_rejected")
    assert rejected.path == newest
    assert "is not the manifest that was committed" in rejected.why
    assert run.events("attempt_started")[1].checkpoint == before
    assert run.final() == peace.final
