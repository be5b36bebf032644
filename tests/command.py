"""`opt-train` in this process or in one of its own, and a small corpus of real text that it
prepared once."""

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from opt_train.cli import main as cli
from tests.train import forked
from tests.train.forked import Forked

PATIENCE_SECONDS = 100.0

SMALL = (
    "model=tiny",
    "model.vocab_size=400",
    "model.positions=32",
    "data=files",
    "data.corpus=corpus",
    "data.validation_fraction=0.2",
    "data.sequence_length=32",
    "tokenizer.vocab_size=400",
    "precision=fp32",
    "optim.warmup_steps=2",
    "train.steps=12",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.threads=1",
    "checkpoint.every_steps=4",
    "name=small",
)
"""A run of a second, over `corpus` in the working directory."""


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus/` and its `prepared/`."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "corpus").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in (
        "abc.py",
        "bisect.py",
        "cmd.py",
        "heapq.py",
        "queue.py",
        "sched.py",
        "shlex.py",
        "textwrap.py",
    ):
        shutil.copy(library / name, folder / "corpus" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["prepare", *SMALL]) == 0
    return folder


@pytest.fixture
def workplace(prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: its own copy of corpus and prepared data, and nothing
    else."""
    folder = tmp_path / "workplace"
    shutil.copytree(prepared_once, folder)
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `opt-train` with the words given and returns its answer, that of its child processes
    included."""

    def run(*words: str) -> Said:
        capfd.readouterr()
        code = cli.main(list(words))
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return run


def start(
    folder: Path,
    *words: str,
    stdout: IO[Any],
    stderr: IO[Any],
    environment: Mapping[str, str] | None = None,
) -> Forked:
    """`opt-train` with the words given, begun in `folder` as a process of its own.

    It is forked from one that has imported torch, as ranks of tests are: where the start of the
    interpreter is what is tested, start one. Processes that it starts inherit `environment`.
    """
    return forked.server().start(
        ["-m", "opt_train.cli.main", *words],
        env={**os.environ, **(environment or {})},
        stdout=stdout,
        stderr=stderr,
        cwd=folder,
    )


def say_apart(folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> Said:
    """The answer of `opt-train`, run by `start`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(folder, *words, stdout=out, stderr=err, environment=environment)
        try:
            code = process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return Said(code, *texts)
