"""One line a step, whatever is told twice or torn by a crash."""

import json
import math
from pathlib import Path

import pytest
from opt_logbook.record.metrics import JOURNAL_HEAD, MetricsWriter, newest_lines, number_of, read
from opt_logbook.record.run_directory import RunDirectory


def test_a_line_told_twice_is_written_once_also_after_a_restart(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for _ in range(2):
        with MetricsWriter(run) as writer:
            told = [
                writer.append("1.00", {"step": step, "loss": 1.0 / step}, "7 abc")
                for step in (1, 2, 3, 2)
            ]
    assert told == [False] * 4
    assert [line["step"] for line in read(run).lines] == [1, 2, 3]
    assert [line.get(JOURNAL_HEAD) for line in read(run).lines] == ["7 abc", None, None]


def test_a_torn_last_line_is_tolerated_and_cut_before_the_next(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricsWriter(run) as writer:
        writer.append("1.00", {"step": 1})
    with run.metrics_of("1.00").open("ab") as file:
        file.write(b'{"step":2,"lo')
    assert (len(read(run).lines), read(run).torn) == (1, ("1.00",))
    with MetricsWriter(run) as writer:
        writer.append("1.00", {"step": 2, "loss": math.nan})
    lines = [json.loads(line) for line in run.metrics_of("1.00").read_bytes().splitlines()]
    assert lines == [{"attempt": "1.00", "step": 1}, {"attempt": "1.00", "step": 2, "loss": "NaN"}]


def test_attempts_are_read_in_the_order_they_ran(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricsWriter(run) as writer:
        for attempt in ("1.100", "2.00", "1.99", "10.00"):
            writer.append(attempt, {"step": 1})
    assert [line["attempt"] for line in read(run).lines] == ["1.99", "1.100", "2.00", "10.00"]


def test_an_attempt_s_name_is_no_path(tmp_path: Path) -> None:
    with (
        MetricsWriter(RunDirectory(tmp_path)) as writer,
        pytest.raises(ValueError, match="not an attempt"),
    ):
        writer.append("../../etc/passwd", {"step": 1})


def test_lines_that_contradict_one_another_are_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.mkdir()
    run.metrics_of("1.00").write_text(
        '{"step":1,"loss":2.0}\n{"step":1,"loss":2.0}\n{"step":1,"loss":3.0}\nx\n'
    )
    reading = read(run)
    assert reading.conflicts == (("1.00", 1, 3),)
    assert reading.broken == (("1.00", 4),)
    assert [line["loss"] for line in reading.lines] == [2.0]


def test_what_is_no_number_is_none() -> None:
    line = {"a": 1, "b": "NaN", "c": None, "d": True, "e": math.inf, "f": 10**400}
    assert [number_of(line, key) for key in "abcdefg"] == [1.0, None, None, None, None, None, None]


def test_the_newest_line_is_the_last_whole_one_however_long_the_file(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert newest_lines(run, "1.00", 1) == []
    with MetricsWriter(run) as writer:
        for step in range(1, 2001):
            writer.append("1.00", {"step": step, "padding": "x" * 100})
    with run.metrics_of("1.00").open("ab") as file:
        file.write(b'{"step":2001,"lo')
    (line,) = newest_lines(run, "1.00", 1)
    assert line["step"] == 2000


@pytest.mark.parametrize(
    ("count", "upto", "expected"),
    [
        (3, None, [1998, 1999, 2000]),
        (0, None, []),
        (1500, None, list(range(501, 2001))),
        (9000, None, list(range(1, 2001))),
        (2, 7, [6, 7]),
        (9, 0, []),
    ],
)
def test_the_newest_lines_are_read_from_the_end(
    tmp_path: Path, count: int, upto: int | None, expected: list[int]
) -> None:
    run = RunDirectory(tmp_path)
    with MetricsWriter(run) as writer:
        for step in range(1, 2001):
            writer.append("1.00", {"step": step, "padding": "x" * 100})
    lines = newest_lines(run, "1.00", count, upto)
    assert [line["step"] for line in lines] == expected
