"""An appended line is durable before anybody acts on it, and before the head names it."""

import os
import time
from pathlib import Path

import pytest
from opt_logbook.record.events import Entry, Note
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from tests.durability import recorded


def test_a_line_is_on_the_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    with Lock.acquire(run) as lock:
        calls = recorded(monkeypatch)
        with Journal.open(run, lock) as journal:
            assert ("sync", tmp_path.name) in calls, (
                "the file's own name, or the whole journal may be gone"
            )
            for _ in range(2):
                calls.clear()
                journal.append(Entry(time.time(), "", None, Note("ada", "fine")))
                line, head = (
                    calls.index(("sync", "journal.jsonl")),
                    calls.index(("rename", "journal.head")),
                )
                partial = f".journal.head.{os.getpid()}.new"
                assert line < calls.index(("sync", partial)) < head
