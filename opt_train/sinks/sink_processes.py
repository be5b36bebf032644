"""Starts the sinks of a run, and ends them in bounded time. The starter never waits for one while
it trains."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.host import signals
from opt_train.sinks.config import SinksConfig

KILLED_SECONDS = 1.0
"""For a killed process to be gone. One that hangs in a dead file system is left to the kernel."""


class SinkProcesses:
    """The sinks that a configuration asks for: a process each, in a session of its own."""

    def __init__(
        self, run: RunDirectory, config: SinksConfig, report: Callable[[str], None]
    ) -> None:
        """`report` gets a sentence where a sink does not start or does not stay; perhaps from
        another thread."""
        self._run, self._config, self._report = run, config, report
        self._running: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
        self._closing = False

    def start(self) -> None:
        """Start them. Call it from the main thread, once the run is locked and its `config.json`
        written."""
        for name, wanted in (
            ("wandb", self._config.wandb),
            ("tensorboard", self._config.tensorboard),
        ):
            if not wanted:
                continue
            if not _is_installed(name):
                self._report(
                    f"sinks.{name}=true, but {name} is not installed; training goes on without it; "
                    f"install it with: pip install 'opt-train[{name}]'"
                )
                continue
            try:
                self._start(name)
            except OSError as error:
                self._report(
                    f"the {name} sink could not be started ({error.strerror}); training goes on "
                    "without it"
                )

    def _start(self, name: str) -> None:
        self._run.make_folder(self._run.logs)
        # -P: a folder `wandb` where the run was started is not the library.
        command = [sys.executable, "-P", "-m", "opt_train.sinks", str(self._run.path), name]
        # In a session of its own: Ctrl-C in the starter's terminal is not for it, it has lines to
        # send.
        with self._log.open("ab") as log, signals.blocked():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        watch = threading.Thread(
            target=self._watch, args=(name, process), name=f"sink {name}", daemon=True
        )
        watch.start()
        self._running.append((process, watch))

    def _watch(self, name: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._closing:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            self._report(
                f"the {name} sink ended early ({how}); training goes on without it; see {self._log}"
            )

    @property
    def _log(self) -> Path:
        return self._run.logs / "sinks.log"

    def close(self) -> None:
        """Let them send their last lines for at most `flush_seconds` in all, then kill what is
        left."""
        self._closing = True
        for process, _ in self._running:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + self._config.flush_seconds
        for process, watch in self._running:
            watch.join(max(0.0, deadline - time.monotonic()))
            if watch.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                watch.join(KILLED_SECONDS)
        self._running = []


def _is_installed(name: str) -> bool:
    """Whether there is such a package; a mere folder of the name is none."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None
