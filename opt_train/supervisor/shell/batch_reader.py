"""The documents of a batch, read by a process that gives way to the ranks: the prepared data may be
terabytes on a slow file system, and the supervisor leads meanwhile."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from typing import Any

from opt_logbook.record.events import Entry
from opt_logbook.record.node_events import ActionWithheld
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.stability_events import BatchSource, InstabilitySeen

from opt_train.host import signals
from opt_train.protocol.exits import DONE
from opt_train.supervisor.inputs import BatchRead
from opt_train.supervisor.rules.stability.alarms import WITHHELD

SECONDS_MAX = 120.0
"""Data without an index of its documents has to be read through; who wants to wait for longer asks
by hand."""
SOURCES_MAX = 6
"""That are named, the largest shares; the others are counted."""
SOURCE_CHARACTERS_MAX = 300

log = logging.getLogger(__name__)


def alarm_of(entry: Entry) -> str:
    """The alarm that the journal's line is about, where it is about one; else empty."""
    match entry.event:
        case InstabilitySeen(alarm=alarm):
            return alarm
        case ActionWithheld(action=action) if action.startswith(WITHHELD):
            return action.removeprefix(WITHHELD)
    return ""


async def read_batch(run: RunDirectory, attempt: str, step: int, alarm: str) -> BatchRead | None:
    """The documents of the batch that took `attempt` to `step`; None: they cannot be known, and the
    log says why."""
    # By the command: it reads numpy and the tokenizer, which this process does without for months.
    words = ("--attempt", attempt, "--step", str(step), "--json")
    # A Ctrl-C at the terminal reaches its whole process group, and is meant for the run alone.
    with signals.blocked():
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "opt_train.cli.main", "batch", str(run.path), *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    try:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        # Its work is for a reader: the ranks that share a machine with it come first.
        async with asyncio.timeout(SECONDS_MAX):
            said, why = await process.communicate()
    except TimeoutError:
        log.warning("the batch of step %d could not be read within %g s", step, SECONDS_MAX)
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != DONE:
        log.warning(
            "the batch of step %d could not be read: %s", step, why.decode("utf-8", "replace")
        )
        return None
    documents = json.loads(said)["documents"]
    sources = tuple(_source_of(found) for found in documents[:SOURCES_MAX])
    return BatchRead(attempt, step, alarm, len(documents), sources)


def _source_of(found: dict[str, Any]) -> BatchSource:
    name = str(found["file"] or "")
    # From behind: the folders that all of them lie in tell nothing.
    if len(name) > SOURCE_CHARACTERS_MAX:
        name = f"…{name[-SOURCE_CHARACTERS_MAX:]}"
    if name and found["line"]:
        name += f" line {found['line']:,}"
    return BatchSource(name, found["document"], round(found["share"], 4))
