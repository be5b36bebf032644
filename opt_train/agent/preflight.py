"""The tests of a node that stands by, in a child that the agent can end at any moment.

The agent starts the program of `burn_in` that tests one node, and makes a `NodeFinding` of each
test that failed. Ranks have the right of way: whatever begins here ends the tests first.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from opt_train.burn_in.results import NodeReport, report_of
from opt_train.diagnosis.causes import Cause
from opt_train.host import signals
from opt_train.host.processes import die_with_parent
from opt_train.protocol.facts import LogLine, NodeFinding, PreflightEnded
from opt_train.protocol.framing import Message

SPARE_SECONDS = 10.0
"""The program keeps its own deadline; if it does not, it is killed this much later."""
CONFIDENCE = 0.9

log = logging.getLogger(__name__)


def findings_of(report: NodeReport) -> Iterator[NodeFinding]:
    """What is wrong with the node."""
    for result in report.results:
        if not result.trouble:
            continue
        # The shared file system is everybody's: that it was full, or slow, for a while makes no
        # node unfit for the rest of the run.
        permanent = result.cause != Cause.STORAGE or bool(result.detail)
        yield NodeFinding(
            result.cause or Cause.UNKNOWN,
            result.detail or f"preflight: {result.test}",
            permanent,
            CONFIDENCE,
            (LogLine("preflight", 0, result.trouble),),
        )


class NodePreflight:
    """At most one test of the node at a time; `publish` takes findings, and how it ended."""

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        publish: Callable[[Message], None],
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """`start` runs a coroutine beside the agent's own work."""
        self._command, self._seconds = command, seconds
        self._publish, self._start = publish, start
        self._child: asyncio.subprocess.Process | None = None
        self._stopped_for = ""
        self._running = False

    def begin(self) -> None:
        """Start the tests, if they do not run."""
        if not self._running:
            self._running, self._stopped_for = True, ""
            self._start(self._run())

    def stop(self, why: str) -> None:
        """Kill what runs; returns at once."""
        if not self._running or self._stopped_for:
            return
        self._stopped_for = why
        self._kill()

    def _kill(self) -> None:
        # Its instruments are in groups of their own, and the kernel ends each with this program.
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    async def _run(self) -> None:
        began = time.monotonic()
        try:
            report, why = await self._report()
        finally:
            self._child, self._running = None, False
        found = list(findings_of(report)) if report is not None else []
        # Before the answer: whoever waits for that may begin on this node.
        for finding in found:
            log.error("%s: %s", finding.cause, finding.evidence[0].text)
            self._publish(finding)
        tests = len(report.results) if report is not None else 0
        seconds = round(time.monotonic() - began, 3)
        log.info("preflight: %d of %d tests failed %s", len(found), tests, why)
        self._publish(PreflightEnded(tests, len(found), seconds, why))

    async def _report(self) -> tuple[NodeReport | None, str]:
        """What the program found, or why it did not come to its end."""
        try:
            with signals.blocked():
                self._child = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    process_group=0,
                    preexec_fn=die_with_parent(os.getpid()),
                )
        except OSError as error:
            return None, f"the tests cannot be started: {error.strerror}"
        if self._stopped_for:  # while it was being started
            self._kill()
        try:
            async with asyncio.timeout(self._seconds + SPARE_SECONDS):
                output, _ = await self._child.communicate()
        except TimeoutError:
            self._kill()
            return None, "the tests have not ended in time"
        finally:
            self._kill()
        # What a killed program has printed is no result, though it be whole.
        if self._stopped_for:
            return None, self._stopped_for
        try:
            return report_of(output.decode(errors="replace")), ""
        except ValueError as error:
            return None, f"the tests ended with code {self._child.returncode}: {error}"
