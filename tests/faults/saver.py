"""Saves as ranks do and commits as the supervisor does, a process each: `python -m
tests.faults.saver RUN`.

Every line of its input is a JSON object, `Case`; it is answered by one line, `Answer`. The process
itself has imported torch once and forks for each case, so that a case may be killed, and costs
milliseconds.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint.late_files import retry_while_late
from tests.train.rig import environment

if TYPE_CHECKING:
    import torch
    from opt_logbook.record.lock import Lock

ATTEMPT = "1.00"


@dataclass(frozen=True, slots=True)
class Case:
    """What one child does."""

    deed: str
    """`save`: save, commit, and give up as the supervisor does if that fails · `save-only` ·
    `commit-only`: what another child has reported · `verify`, `restore` or `retire` a committed one
    · `clear`, keeping this one, as before an attempt."""
    step: int
    value: float = 1.0
    """Of the tensors."""
    sha256: str = ""
    """Of the manifest, to verify or restore; for `commit-only` the answer of `save-only`."""
    wait: str = ""
    """A file that must be there before the deed begins."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of it."""

    why: str = ""
    """Empty: it went well."""
    sha256: str = ""
    left: list[str] = field(default_factory=list)
    """Files that a save which failed has left behind, before the supervisor removed what was
    left."""
    signal: int = 0
    """That ended the child, which has said nothing then."""
    crash: str = ""
    """A traceback of what should not be raised."""


class Saver:
    """The process, seen from a test."""

    def __init__(self, run: Path, shim_environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.saver", str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment(), **shim_environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, case: Case) -> None:
        """Let a child do it; `end` waits for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()

    def end(self) -> Answer:
        """Of the case that was begun."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the saver has ended"
        answer = Answer(**json.loads(line))
        assert not answer.crash, answer.crash
        return answer

    def do(self, deed: str, step: int, sha256: str = "", value: float = 1.0) -> Answer:
        """`begin` and `end`."""
        self.begin(Case(deed, step, value, sha256))
        return self.end()


def path_of(step: int) -> str:
    """Of the checkpoint of `step`, in the run directory."""
    return f"checkpoints/{ATTEMPT}/step-{step:08d}"


class Child:
    """Does a case, as rank and supervisor do it. Made before the fork: torch is imported once."""

    def __init__(self, run: RunDirectory, lock: "Lock") -> None:
        import torch

        from opt_train.run.checkpoint_keeper import CheckpointKeeper

        torch.set_num_threads(1)
        self.run, self.keeper = run, CheckpointKeeper(run, lock, "c0")
        self.weights = {
            "model.weight": torch.ones(64, 8),
            "optimizer.weight.exp_avg": torch.ones(64, 8),
        }

    def tensors(self) -> "dict[str, torch.Tensor]":
        """To restore into."""
        return {name: tensor * 0 for name, tensor in self.weights.items()}

    def put_back(self, tensors: object) -> None:
        """What was restored is looked at by nobody."""

    def do(self, case: Case) -> Answer:
        from opt_train.checkpoint.manifest import CheckpointError

        while case.wait and not Path(case.wait).exists():
            time.sleep(0.001)
        path = path_of(case.step)
        try:
            match case.deed:
                case "save":
                    return self.save_and_commit(case)
                case "save-only":
                    return Answer(sha256=self.save(case))
                case "commit-only":
                    return self.commit(case, case.sha256)
                case "clear":
                    self.keeper.clear((ATTEMPT,), {path})
                case "verify":
                    return Answer(self.keeper.verify(path, case.sha256).why)
                case "retire":
                    self.keeper.retire(path)
                case "restore":
                    self.restore(self.run.path / path, case.sha256)
                case _:
                    raise ValueError(case.deed)
        except CheckpointError as error:
            return Answer(str(error))
        return Answer()

    def save(self, case: Case) -> str:
        """What the rank reports, as JSON."""
        from opt_train.checkpoint.save import save

        values = {name: tensor * case.value for name, tensor in self.weights.items()}
        saved = save(
            values,
            {"step": case.step, "generation": case.value},
            self.run.path / path_of(case.step),
        )
        return json.dumps({file.path: (file.bytes, file.sha256) for file in saved})

    def commit(self, case: Case, report: str) -> Answer:
        """Of what was reported; nothing is removed where that is refused."""
        path = path_of(case.step)
        files = {name: (size, sha256) for name, (size, sha256) in json.loads(report).items()}
        folder = str(self.run.path / path)
        done = self.keeper.commit(path, folder, ATTEMPT, case.step, files, "0" * 64)
        return Answer(done.why, done.manifest_sha256)

    def save_and_commit(self, case: Case) -> Answer:
        from opt_train.checkpoint.manifest import CheckpointError

        path, left = path_of(case.step), []
        try:
            report = self.save(case)
        except CheckpointError as error:
            with contextlib.suppress(OSError):
                left = [file.name for file in (self.run.path / path).glob("*")]
            self.keeper.retire(path)
            return Answer(str(error), left=left)
        answer = self.commit(case, report)
        if answer.why:
            self.keeper.retire(path)  # as `policy_saves.abandon` has it done
        return answer

    def restore(self, folder: Path, sha256: str) -> None:
        from opt_train.checkpoint import manifest
        from opt_train.checkpoint.restore import load_files, verify_files

        read = retry_while_late(folder, lambda: manifest.read(folder, sha256))
        verify_files(folder, read, patient=True)
        load_files(self, folder, read)


def answer_in_a_fork(child: Child, case: Case) -> Answer:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = child.do(case)
        except BaseException:
            answer = Answer(crash=traceback.format_exc())
        os.write(writer, json.dumps(asdict(answer)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return Answer(signal=os.WTERMSIG(status))
    return Answer(**json.loads(said))


def main(run: RunDirectory) -> None:
    from opt_logbook.record.lock import Lock

    import opt_train.checkpoint.restore
    import opt_train.checkpoint.save  # noqa: F401 - before the first fork

    run.path.mkdir(exist_ok=True)
    into = RunDirectory(Path(os.environ.get("SAVES_INTO", str(run.path))))
    with Lock.acquire(run, leader=1) as lock:
        child = Child(into, lock)
        for line in sys.stdin:
            print(json.dumps(asdict(answer_in_a_fork(child, Case(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main(RunDirectory(Path(sys.argv[1])))
