"""A `git pull` under a run changes nothing of what trains: the restart at three in the morning runs
the code that the lineage began with, and only what supervises may have been mended."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import opt_logbook
import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    Entry,
    InForceReported,
    LineageOpened,
    SupervisorStarted,
)
from opt_logbook.record.journal import Journal, read
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

import opt_train
from opt_train.config.compose import compose
from opt_train.protocol.exits import BadInput
from opt_train.run import lineage
from opt_train.run.code import frozen_code
from tests import command
from tests.command import Said

SMALL = (*command.SMALL, "train.steps=6", "supervisor.orphan_seconds=4")
RUN = [sys.executable, "-P", "-m", "opt_train.cli.main", "run", *SMALL]


@pytest.fixture(scope="module")
def stopped_once(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was cut off after its first checkpoint, in a workplace."""
    folder = tmp_path_factory.mktemp("stopped") / "workplace"
    shutil.copytree(prepared_once, folder)
    done = command.say_apart(folder, "train", *SMALL, environment={"NCCL_ALGO": "Ring"})
    assert done.code == 0, done.err
    run = RunDirectory(folder / "runs" / "small")
    lines = run.journal.read_bytes().splitlines(keepends=True)
    [first, *_] = [k for k, line in enumerate(lines) if b'"kind":"checkpoint_committed"' in line]
    run.journal.write_bytes(b"".join(lines[: first + 1]))
    run.head.unlink()
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(Entry(time.time(), "1.00", 4, AttemptEnded(1, "failed")))
    return run.path


@pytest.fixture
def run(workplace: Path, stopped_once: Path) -> RunDirectory:
    copy = RunDirectory(workplace / "runs" / "small")
    shutil.copytree(stopped_once, copy.path)
    return copy


class Installation:
    """Another installation of both packages, which a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in (opt_train, opt_logbook):
            shutil.copytree(
                Path(package.__path__[0]),
                folder / package.__name__,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        presets = Path(opt_train.__path__[0]).parent / "configs"
        shutil.copytree(presets, folder / "configs")

    def append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(text)

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new, 1))

    def say(self, *words: str, environment: Mapping[str, str] | None = None) -> Said:
        """What its `opt-train run` answers."""
        done = subprocess.run(
            [*RUN, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=command.PATIENCE_SECONDS,
            env={**os.environ, "PYTHONPATH": str(self.folder), **(environment or {})},
        )
        return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "installation")


def test_ranks_run_the_code_that_the_lineage_began_with(
    run: RunDirectory, installation: Installation
) -> None:
    installation.append("opt_train/train/step.py", "raise SystemExit('pulled in the night')\n")
    installation.append("opt_train/agent/agent.py", "raise SystemExit('pulled in the night')\n")
    installation.append("opt_train/supervisor/core.py", "# mended\n")
    done = installation.say(environment={"NCCL_ALGO": "Tree"})
    assert done.code == 0, done.err
    assert "what is installed differs (code: opt_train/agent/agent.py changed;" in done.err
    assert "add lineage=new to train with it" in done.err
    entries = read(run.journal).entries
    [opened] = [e.event for e in entries if isinstance(e.event, LineageOpened)]
    assert opened.code_sha256 == frozen_code.sha256_of_sources(run.path / "code" / "1")
    [started] = [e.event for e in entries if isinstance(e.event, SupervisorStarted)]
    assert started.code_difference == (
        "code: opt_train/agent/agent.py changed",
        "code: opt_train/supervisor/core.py changed",
        "code: opt_train/train/step.py changed",
    )
    attempts = [e.attempt for e in entries if isinstance(e.event, AttemptStarted)]
    assert attempts == ["1.00", "1.01"]
    # A setting that came with the restart is on record too (opt_train/run/fabric_settings.py).
    first, second = [e.event for e in entries if isinstance(e.event, InForceReported)]
    assert (first.environment["NCCL_ALGO"], second.environment["NCCL_ALGO"]) == ("Ring", "Tree")
    assert "NCCL_ALGO: Ring -> Tree" in second.environment_difference
    told = (run.chronicle / "chronicle.md").read_text()
    assert "NCCL_ALGO: Ring -> Tree" in told.replace("\\", "")
    assert "with code that is not the lineage's (code: opt_train/agent/agent.py changed" in told


def test_a_supervisor_whose_messages_the_copy_does_not_understand_is_refused(
    run: RunDirectory, installation: Installation
) -> None:
    installation.append(
        "opt_train/protocol/commands.py",
        "@dataclass(frozen=True, slots=True)\n"
        "class Dance(Message, kind='dance'):\n"
        "    steps: int\n",
    )
    before = run.journal.read_bytes()
    done = installation.say()
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "cannot be supervised by the code that is installed: it speaks another" in done.err
    assert "add lineage=new" in done.err
    assert run.journal.read_bytes() == before


def test_a_supervisor_with_a_key_that_the_copy_does_not_know_is_refused(
    run: RunDirectory, installation: Installation
) -> None:
    installation.replace(
        "opt_train/clusters/config.py",
        "    nodes: Annotated",
        "    towers: int = 1\n    nodes: Annotated",
    )
    done = installation.say()
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "cluster.towers is no configuration key" in done.err


def test_a_copy_that_somebody_edited_is_refused(run: RunDirectory, say) -> None:
    file = run.path / "code" / "1" / "opt_train" / "train" / "step.py"
    file.write_text(file.read_text() + "# only this once\n")
    done = say("run", *SMALL)
    assert done.code == 2
    assert done.err == (
        f"opt-train: {run.path}/code/1 is not the code that was copied there when the lineage "
        "began; restore it, or add lineage=new to go on with the code that is installed\n"
    )


def test_other_packages_are_refused_though_the_code_is_kept(run: RunDirectory, say) -> None:
    """They are the environment's, and change what is computed."""
    listed = run.path / "code" / "1" / "packages.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(line for line in lines if not line.startswith("numpy==")))
    done = say("run", *SMALL)
    assert done.code == 2
    assert "was trained with other code (numpy: absent -> " in done.err


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that dies while it copies, or finds the disk full, leaves nothing that passes for the
    lineage's code; the next one makes it anew."""
    target = tmp_path / "code" / "1"
    config = compose(command.SMALL)
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(frozen_code, "replace_file", full)
        with pytest.raises(OSError, match="No space left"):
            frozen_code.freeze(target, config)
    assert not target.exists()
    frozen_code.freeze(target, config)
    assert [path.name for path in target.parent.iterdir()] == ["1"]
    record = frozen_code.read_record(target)
    assert record is not None
    assert record.sha256 == frozen_code.sha256_of_running_code()
    assert frozen_code.code_difference(target) == frozen_code.CodeDifference()
    assert frozen_code.why_not_understood(target, config, lineage.wire_signature()) == ""


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / frozen_code.RECORD).write_text("{}")
    with pytest.raises(BadInput, match=r"cannot be read \('sha256'\)|cannot be read \('state'\)"):
        frozen_code.read_record(tmp_path)
