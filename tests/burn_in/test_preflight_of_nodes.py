"""`opt-train preflight` with its real programs on three nodes: who is broken must be named, by one
bit, and nothing may stay behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from tests.burn_in.corruption import corrupt
from tests.command import Said
from tests.forms import FORMS
from tests.processes import processes_of

QUICK = (
    *("cluster=local", "cluster.nodes=2", "cluster.buffer_nodes=1", "train.device=cpu"),
    *("burn_in.matmul_size=128", "burn_in.matmul_seconds=0.1", "burn_in.pair_rounds=1"),
    *("burn_in.host_memory_bytes=1000000", "burn_in.file_bytes=1000000"),
    *("burn_in.pair_bytes=1000000", "name=quick"),
)


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_node_with_a_wrong_bit_is_named(
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    say: Callable[..., Said],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in corrupt(tmp_path / "site", "node-2").items():
        monkeypatch.setenv(name, value)
    nodes = ("node-1", "node-2", "node-3") if form == "whole" else ("node-1", "node-2")
    more = ("burn_in.pair_rounds=3",) if form == "whole" else ("cluster.buffer_nodes=0",)
    said = say("preflight", *QUICK, *more, "--json")
    assert said.code == 1, said.err
    answer = json.loads(said.out)
    assert answer["failed"] == ["node-2"]
    [bad] = [result for result in answer["nodes"]["node-2"] if result["trouble"]]
    assert (bad["test"], bad["cause"]) == ("matmul", "silent_corruption")
    assert bad["trouble"].startswith("1 of ")
    assert tuple(answer["nodes"]) == nodes
    for node in nodes:
        tests = {result["test"] for result in answer["nodes"][node]}
        assert tests == {
            *("matmul", "host memory", "disk", "shared file system", "cores", "clock"),
            "all-reduce",
        }
    assert os.listdir(tmp_path / "runs") == []


@pytest.mark.slow
def test_nodes_that_are_well_are_a_table_and_exit_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[..., Said]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = say("preflight", *QUICK)
    assert said.code == 0, said.out + said.err
    assert said.out.splitlines()[-1] == "3 nodes, all well"
    assert "all-reduce in pairs, round 1 of 1" in said.err


def test_a_signal_ends_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The fixture fails where a program of a node lives on."""
    long = ("cluster.buffer_nodes=0", "burn_in.matmul_seconds=100")
    process = subprocess.Popen(
        [sys.executable, "-m", "opt_train.cli.main", "preflight", *QUICK, *long],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60.0
    while len(processes_of(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)  # a program for each node, and its instruments
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert os.listdir(tmp_path / "runs") == []


def test_two_preflights_of_one_name_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[..., Said]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunDirectory(tmp_path / "runs" / "quick.preflight")
    folder.path.mkdir(parents=True)
    with Lock.acquire(folder):
        said = say("preflight", *QUICK)
    assert said.code == 2
    assert "another preflight of quick is under way" in said.err
