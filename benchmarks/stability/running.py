"""Runs are done once: each result is kept in a file of its own, and what is there is not done
again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from benchmarks.stability.outcomes import BROKEN, Result, read_run
from benchmarks.stability.settings import Run, as_json
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE, STOPPED

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 1800.0
"""Of one run. A minute is usual; on a machine that does other things, ten."""
STOP_SECONDS = 60.0


class Broken(Exception):
    """A run ended in a way that says nothing about the supervision."""


class Runner:
    """Does runs, so many at a time, and keeps their results under `folder`."""

    def __init__(self, folder: Path, parallel: int, keep: bool = False) -> None:
        """Keep results under `folder`.

        Args:
            keep: leave the run directories there too.
        """
        self._folder, self._parallel, self._keep = folder.resolve(), parallel, keep
        self._data = self._folder / "data"
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._ending = False

    def known(self, run: Run) -> Result | None:
        """The result that is kept."""
        path = self._path(run)
        if not path.exists():
            return None
        return Result.from_json(json.loads(path.read_text())["result"])

    def do(self, runs: Iterable[Run], report: Callable[[Run, Result], None]) -> dict[str, Result]:
        """The results of all `runs` by their names; `report` is called with those that were not
        there. One that broke is left out."""
        wanted = {run.name: run for run in runs}
        found = {name: known for name, run in wanted.items() if (known := self.known(run))}
        missing = [run for name, run in wanted.items() if name not in found]
        if missing:
            self._prepare(missing[0])
        with ThreadPoolExecutor(self._parallel) as pool:
            try:
                results = pool.map(lambda run: self._try(run, report), missing)
                for run, result in zip(missing, results, strict=True):
                    if result is not None:
                        found[run.name] = result
            except BaseException:
                self._end()
                raise
        return found

    def _path(self, run: Run) -> Path:
        return self._folder / "results" / f"{_file_name(run.name)}.json"

    def _prepare(self, run: Run) -> None:
        """The data, before several runs at once would."""
        done = self._start(run, "prepare")
        if (code := done.wait(600)) != DONE:
            raise Broken(f"opt-train prepare ended with {code}: {self._output(run)}")

    def _try(self, run: Run, report: Callable[[Run, Result], None]) -> Result | None:
        if self._ending:
            return None
        try:
            result = self._do(run)
        except Broken as error:
            if not self._ending:
                print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            return None
        # At once, and not in the order of the runs: whoever looks on wants to see it move.
        report(run, result)
        return result

    def _do(self, run: Run) -> Result:
        self._forget(run)
        began = time.monotonic()
        process = self._start(run, "run")
        try:
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._stop(process)
            raise Broken(f"was not done in {LIMIT_SECONDS:.0f} s") from None
        finally:
            self._processes.discard(process)
        if code not in (DONE, STOPPED, PERSON_MUST_DECIDE):
            raise Broken(f"ended with {code}: {self._output(run)}")
        seconds = time.monotonic() - began
        result = read_run(self._directory(run), run.odd_batches, round(seconds, 1))
        if result.end == BROKEN:
            raise Broken(f"was stopped by somebody else: {self._output(run)}")
        path = self._path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        # By rename: a result that is half written would be believed.
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({**as_json(run), "result": result.to_json()}, indent=1) + "\n")
        draft.replace(path)
        if not self._keep:
            self._forget(run)
        return result

    def _work(self, run: Run) -> Path:
        return self._folder / "runs" / _file_name(run.name)

    def _directory(self, run: Run) -> RunDirectory:
        return RunDirectory(self._work(run) / "run")

    def _forget(self, run: Run) -> None:
        shutil.rmtree(self._work(run), ignore_errors=True)

    def _output(self, run: Run) -> str:
        path = self._work(run) / "output"
        return path.read_text(errors="replace")[-1500:] if path.exists() else ""

    def _start(self, run: Run, verb: str) -> subprocess.Popen[bytes]:
        work = self._work(run)
        work.mkdir(parents=True, exist_ok=True)
        places = (f"data.directory={self._data}", f"runs={work}", "name=run")
        with (work / "output").open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "opt_train.cli.main", verb, *run.overrides(), *places],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self._environment(run),
                # Ctrl-C is for the benchmark, which ends its runs itself.
                start_new_session=True,
            )
        self._processes.add(process)
        return process

    def _environment(self, run: Run) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "logbook"), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "SICK": json.dumps(run.sick()),
            "SICK_FOLDER": str(self._work(run)),
        }

    def _end(self) -> None:
        """End what runs: it is done again when the benchmark goes on."""
        self._ending = True
        for process in list(self._processes):
            self._stop(process)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        # Agents and ranks are led by it: it ends them.
        for asked in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(asked)
                try:
                    process.wait(STOP_SECONDS / 2)
                except subprocess.TimeoutExpired:
                    continue


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
