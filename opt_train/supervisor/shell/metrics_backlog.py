"""Metrics lines on their way into their files: what a full disk does not take now, it takes later.

Used by one thread, and nobody waits for it.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from opt_logbook.record.metrics import MetricsWriter

LINES_KEPT = 10_000
"""That wait for the file system; beyond that the oldest are lost. Some 10 MB."""

log = logging.getLogger(__name__)


class MetricsBacklog:
    """Lines in the order in which they came, none written before an older one."""

    def __init__(self, writer: MetricsWriter, head: Callable[[], str]) -> None:
        """`head`: where the journal stands now."""
        self._writer, self._head = writer, head
        self._waiting: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=LINES_KEPT)
        self._failures = 0
        self._lost = 0

    def write(self, attempt: str, line: Mapping[str, Any]) -> None:
        """Write the line behind those that wait, or have it wait as well."""
        if len(self._waiting) == LINES_KEPT:
            self._lost += 1
            self._log(self._lost, f"{self._lost} metrics lines are lost: they have waited too long")
        self._waiting.append((attempt, line))
        self._flush()

    def close(self) -> None:
        """Write what waits, if that can be done now, and close the file."""
        self._flush()
        if self._waiting:
            log.error("%d metrics lines could not be written", len(self._waiting))
        self._writer.close()

    def _flush(self) -> None:
        # The oldest first, and none before it: a curve with a hole shows the hole and not a jump.
        while self._waiting:
            attempt, line = self._waiting[0]
            try:
                self._writer.append(attempt, line, self._head())
            except OSError as error:
                self._failures += 1
                waiting = len(self._waiting)
                self._log(self._failures, f"{waiting} metrics lines wait to be written: {error}")
                return
            except (ValueError, TypeError) as error:
                # It will never be a line, and must not hold up those that are.
                log.error("a metrics line makes no sense: %s", error)
            self._waiting.popleft()

    def _log(self, times: int, what: str) -> None:
        # At the first, second, fourth, eighth: a dead file system must not fill the log as well.
        if times.bit_count() == 1:
            log.error("%s", what)
