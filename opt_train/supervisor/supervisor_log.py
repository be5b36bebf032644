"""Log lines written by a thread, so that a sick disk stalls nobody; `logs/supervisor.log` is written so."""

import logging
import logging.handlers
import queue
import time
from pathlib import Path
from typing import Self

_ROOM = "opt_train.supervisor"


def written_beside(
    handler: logging.Handler,
) -> tuple[logging.handlers.QueueHandler, logging.handlers.QueueListener]:
    """What a logger is given instead of `handler`, and the thread that hands on to `handler` once it is started."""
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    queued = logging.handlers.QueueHandler(lines)
    queued.setFormatter(logging.Formatter("%(message)s"))  # `handler` adds the rest
    return queued, logging.handlers.QueueListener(lines, handler)


class SupervisorLog:
    """Use as ``with SupervisorLog(path):``; raises OSError if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        form = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        form.converter = time.gmtime
        self._file.setFormatter(form)
        self._queue, self._listener = written_beside(self._file)
        self._logger = logging.getLogger(_ROOM)

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
