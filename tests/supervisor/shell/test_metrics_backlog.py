"""Metrics lines that a file system does not take: kept in order, and written when it does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.supervisor.shell import metrics_backlog
from opt_train.supervisor.shell.metrics_backlog import MetricsBacklog


class Full(MetricsWriter):
    """One whose disk is full while `full`."""

    full = False

    def append(self, attempt: str, line: Mapping[str, Any], journal_head: str = "") -> bool:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().append(attempt, line, journal_head)


def steps_in(run: RunDirectory, attempt: str) -> list[int]:
    lines = run.metrics_of(attempt).read_text().splitlines()
    return [int(line.partition('"step":')[2].partition(",")[0].rstrip("}")) for line in lines]


def test_lines_wait_for_the_disk_in_their_order(tmp_path: Path) -> None:
    run, head = RunDirectory(tmp_path), "7 abc"
    writer = Full(run)
    backlog = MetricsBacklog(writer, lambda: head)
    backlog.write("1.00", {"step": 1})
    writer.full = True
    for step in (2, 3):
        backlog.write("1.00", {"step": step})
    backlog.write("1.01", {"step": 2})
    assert steps_in(run, "1.00") == [1]
    writer.full = False
    backlog.write("1.01", {"step": 3})
    assert steps_in(run, "1.00") == [1, 2, 3]
    assert steps_in(run, "1.01") == [2, 3]
    writer.full = True
    backlog.write("1.01", {"step": 4})
    writer.full = False
    backlog.close()
    assert steps_in(run, "1.01") == [2, 3, 4]


def test_only_so_many_wait_and_nonsense_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_backlog, "LINES_KEPT", 3)
    run = RunDirectory(tmp_path)
    writer = Full(run)
    backlog = MetricsBacklog(writer, str)
    writer.full = True
    for step in range(1, 6):
        backlog.write("1.00", {"step": step})
    writer.full = False
    backlog.write("1.00", {"step": 6, "loss": object()})
    backlog.write("1.00", {"step": 7})
    assert steps_in(run, "1.00") == [4, 5, 7]
