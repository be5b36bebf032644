"""Fixtures for rooms whose tests start processes: a run directory, and nothing left behind. Their
`conftest.py` imports them."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.host.processes import NODE_MARK, kill_marked
from tests.agent.harness import make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path, orphan_seconds=30.0)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if a process of a node of this test lives on, and end it; fail if a socket's folder is
    still there."""
    # A short path, and one of this test alone: a supervisor makes its socket's folder here.
    with tempfile.TemporaryDirectory(prefix="ot-", dir="/tmp") as sockets:
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield
        _end_processes(tmp_path)
        assert not os.listdir(sockets), "socket folders left behind"


def _end_processes(tmp_path: Path) -> None:
    deadline = time.monotonic() + 30.0
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for mark in left.values():
        kill_marked(mark)
    assert not left, f"processes left behind: {left}"


def processes_of(folder: Path) -> dict[int, str]:
    """Living processes that bear the mark of a node of a run below `folder`: pid and mark."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        start = f"{NODE_MARK}={folder.resolve()}".encode()
        if state not in "ZX":
            found |= {
                int(name): v.decode().partition("=")[2] for v in variables if v.startswith(start)
            }
    return found
