"""Removing a checkpoint may take a file system minutes, and may be cut short: nobody waits, and
somebody ends it."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from opt_logbook.record.codec import GENESIS
from opt_logbook.record.journal import Head
from opt_logbook.record.lock import Lock
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint import manifest
from opt_train.checkpoint.commit import retire_checkpoint
from opt_train.checkpoint.listing import list_checkpoints
from opt_train.run import checkpoint_keeper
from opt_train.run.checkpoint_keeper import CheckpointKeeper, CommitResult
from opt_train.supervisor.effects import (
    ClearUncommitted,
    CommitManifest,
    Effect,
    Finish,
    RetireCheckpoint,
)
from opt_train.supervisor.inputs import Input, ManifestCommitted
from opt_train.supervisor.shell.effect_runner import EffectRunner

SHARDS = 5


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.checkpoints.mkdir(parents=True)
    return directory


def path_of(step: int) -> str:
    return f"checkpoints/1.00/step-{step:08d}"


def saved(run: RunDirectory, step: int) -> CommitManifest:
    """What a rank has written and reported."""
    folder = run.path / path_of(step)
    folder.mkdir(parents=True)
    files = {}
    for name in ("state.json", *(f"{k}.safetensors" for k in range(SHARDS))):
        content = b"{}" if name == "state.json" else name.encode()
        (folder / name).write_bytes(content)
        files[name] = (len(content), hashlib.sha256(content).hexdigest())
    return CommitManifest(path_of(step), str(folder), "1.00", step, files, 0.1)


def commit(keeper: CheckpointKeeper, wanted: CommitManifest) -> CommitResult:
    return keeper.commit(
        wanted.path, wanted.folder, wanted.attempt, wanted.step, wanted.files, "0" * 64
    )


class NoJournal:
    head = Head(0, GENESIS)


def perform(
    run: RunDirectory,
    keeper: CheckpointKeeper,
    effects: list[Effect],
    meanwhile: Callable[[list[Input]], bool],
) -> list[Input]:
    """Carry out `effects` until `meanwhile` is content with the answers, then as a supervisor that
    ends."""
    inputs: list[Input] = []

    async def lead() -> None:
        nobody: Any = None
        runner = EffectRunner(
            cast(Any, NoJournal()),
            MetricsWriter(run),
            nobody,
            nobody,
            keeper,
            nobody,
            inputs.append,
            nobody,
            nobody,
            nobody,
        )
        runner.queue(effects)
        work = asyncio.create_task(runner.run())
        async with asyncio.timeout(20):
            while not meanwhile(inputs):
                await asyncio.sleep(0.01)
        runner.queue([Finish(0, "")])
        await work
        await runner.settle(20)

    asyncio.run(lead())
    return inputs


def test_a_removal_that_takes_long_keeps_no_commit_waiting(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of them stand still: what has been saved becomes a checkpoint all the same."""
    go_on = Event()
    remove = retire_checkpoint

    def stand_still(path: Path) -> None:
        assert go_on.wait(20)
        remove(path)

    monkeypatch.setattr(checkpoint_keeper, "retire_checkpoint", stand_still)
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        old = [saved(run, step).path for step in range(1, 7)]

        def committed(inputs: list[Input]) -> bool:
            if inputs:
                go_on.set()
            return bool(inputs)

        (done,) = perform(run, keeper, [*map(RetireCheckpoint, old), saved(run, 9)], committed)
    assert isinstance(done, ManifestCommitted)
    assert done.why == ""
    assert [folder.name for folder in (run.checkpoints / "1.00").iterdir()] == ["step-00000009"], (
        "ended at the end"
    )


@pytest.mark.parametrize("operation", range(SHARDS + 4))
def test_a_removal_killed_at_any_moment_leaves_a_checkpoint_or_rubbish(
    run: RunDirectory, operation: int
) -> None:
    """Whole with its manifest, or without: never a manifest that vouches for what is gone. Then it
    is ended."""
    with Lock.acquire(run, leader=1) as lock:
        keeper = CheckpointKeeper(run, lock, "c0")
        keep, drop = (commit(keeper, saved(run, step)) for step in (3, 6))
        assert (keep.why, drop.why) == ("", "")
        folder = run.path / path_of(6)
        program = f"""
import os, signal
from pathlib import Path
from opt_train.checkpoint.commit import retire_checkpoint
left = {operation}
def dying(call):
    def instead(*words, **names):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*words, **names)
    return instead
os.unlink, os.rmdir, os.fsync = dying(os.unlink), dying(os.rmdir), dying(os.fsync)
Path.unlink = dying(Path.unlink)
retire_checkpoint(Path({str(folder)!r}))
"""
        process = subprocess.run(
            [sys.executable, "-c", program], check=False, timeout=60, env={**os.environ}
        )
        assert process.returncode in (0, -signal.SIGKILL)
        (listed, *rest) = list_checkpoints(run.checkpoints)
        assert (listed.step, listed.why) == (3, "")
        assert len(rest) == (1 if folder.exists() else 0)
        if rest:
            assert rest[0].why == "" if rest[0].has_manifest else "never committed" in rest[0].why
        # The next supervisor removes what its journal remembers, and before the next attempt
        # whatever is on no record.
        end: Effect = RetireCheckpoint(path_of(6))
        if operation % 2 and not (folder / manifest.MANIFEST).exists():
            end = ClearUncommitted(("1.00",), frozenset({path_of(3)}))
        perform(run, keeper, [end], lambda _: True)
        assert not folder.exists()
        assert keeper.verify(path_of(3), keep.manifest_sha256).why == ""
