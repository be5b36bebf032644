"""The supervisor's log: `logs/supervisor.log`, written by a thread."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Self

from opt_train.host.log_thread import written_beside

_PACKAGE = "opt_train"
"""Whatever room the supervisor's process runs, its lines go into the one log."""


class _LogFile(logging.FileHandler):
    """A log that loses lines where they cannot be written, as on a full disk, and goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        # A traceback a line would drown the status line; that the disk is full the journal says.
        pass


class SupervisorLog:
    """Use as ``with SupervisorLog(path):``; raises OSError if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        form = logging.Formatter(
            "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        # UTC as in the journal: the two are read side by side.
        form.converter = time.gmtime
        self._file.setFormatter(form)
        self._queue, self._listener = written_beside(self._file)
        self._logger = logging.getLogger(_PACKAGE)

    def __enter__(self) -> Self:
        self._level, self._propagated = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.INFO)
        # The terminal belongs to the status line.
        self._logger.propagate = False
        self._logger.addHandler(self._queue)
        self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self._queue)
        self._listener.stop()
        with contextlib.suppress(OSError):  # what waited in its buffer is lost with the rest
            self._file.close()
        self._logger.setLevel(self._level)
        self._logger.propagate = self._propagated
