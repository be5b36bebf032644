"""A rank's log: on the node's disk at once, in the run directory when that can be written, whole
and in order."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.rank_log import MAX_LINE_BYTES, TAIL_LINES, LogCopies, RankLog


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture
def log() -> RankLog:
    return RankLog()


def say(log: RankLog, text: str) -> None:
    os.write(log.fileno(), text.encode())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_end_has_its_true_line_numbers(log: RankLog) -> None:
    say(log, "".join(f"line {number}\n" for number in range(1, 50_001)))
    say(log, "\n" + "x" * 5000 + "\nthe last, without an end")
    tail = log.tail("logs/rank0.log")
    assert len(tail) == TAIL_LINES
    assert [(line.line, line.text) for line in tail[:2]] == [
        (49983, "line 49983"),
        (49984, "line 49984"),
    ]
    assert (tail[-2].line, tail[-2].text) == (50_002, "x" * MAX_LINE_BYTES)
    assert (tail[-1].line, tail[-1].text, tail[-1].file) == (
        50_003,
        "the last, without an end",
        "logs/rank0.log",
    )
    before = log.size
    say(log, " of its line\nstacks\n")
    assert [line.text for line in log.tail("", after_byte=before)] == [" of its line", "stacks"]


def test_who_opens_standard_error_anew_writes_behind_the_rest(log: RankLog) -> None:
    say(log, "one\n")
    subprocess.run(
        ["sh", "-c", "echo two >> /dev/stderr; echo three >&2"], stderr=log.fileno(), check=True
    )
    assert [line.text for line in log.tail("")] == ["one", "two", "three"]


def test_all_of_it_comes_into_the_run_directory(run: RunDirectory, log: RankLog) -> None:
    copies, path = LogCopies(run), run.rank_log("1.00", "n0", 3)
    say(log, "before\n")
    copies.begin(log, path)
    wait_for(lambda: path.exists() and path.read_text() == "before\n")
    long = "y" * (3 << 20) + "\n"
    say(log, long)
    copies.end(log)
    copies.close(20)
    assert path.read_text() == "before\n" + long


def test_what_cannot_be_written_is_written_later(run: RunDirectory, log: RankLog) -> None:
    copies, path = LogCopies(run), run.rank_log("1.00", "n0", 0)
    run.logs.write_text("a file where the folder should be")
    copies.begin(log, path)
    say(log, "one\n")
    time.sleep(0.5)
    say(log, "two\n")
    copies.end(log)
    began = time.monotonic()
    copies.close(0.5)
    assert time.monotonic() - began < 5, "whoever leaves does not wait for ever"
    run.logs.unlink()
    wait_for(lambda: path.exists() and path.read_text() == "one\ntwo\n")


def test_a_removed_run_is_not_made_again(run: RunDirectory, log: RankLog) -> None:
    copies = LogCopies(run)
    run.path.rmdir()
    copies.begin(log, run.rank_log("1.00", "n0", 0))
    say(log, "one\n")
    copies.end(log)
    copies.close(1.0)
    assert not run.path.exists()
    run.path.mkdir()  # another run's
    copies.close(20)
    assert not list(run.path.iterdir())


def test_its_file_lives_as_long_as_somebody_knows_it(run: RunDirectory) -> None:
    copies, log = LogCopies(run), RankLog()
    fd = log.fileno()
    say(log, "one\n")
    copies.begin(log, run.rank_log("1.00", "n0", 0))
    copies.end(log)
    copies.close(20)
    assert log.tail("")[0].text == "one", "whoever still looks for evidence finds it"
    del log, copies
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
