"""The supervisor's log: `logs/supervisor.log`, written by a thread."""

import logging
import time
from pathlib import Path
from typing import Self

from opt_train.host.log_thread import written_beside

_PACKAGE = "opt_train"
"""Whatever room the supervisor's process runs, its lines go into the one log."""


class SupervisorLog:
    """Use as ``with SupervisorLog(path):``; raises OSError if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
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
        self._file.close()
        self._logger.setLevel(self._level)
        self._logger.propagate = self._propagated
