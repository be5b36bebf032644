"""A tail that trusts what it reads would lose lines, tell them twice, or stop at the first torn
one."""

import json
import math
from pathlib import Path

import pytest
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.sinks.metrics_tail import MetricsTail, Position, parse_line


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def write(run: RunDirectory, attempt: str, *steps: int) -> None:
    with MetricsWriter(run) as writer:
        for step in steps:
            writer.append(attempt, {"step": step, "time": 1e9 + step, "loss": 1 / step})


def steps_forwarded(tail: MetricsTail) -> list[tuple[str, int]]:
    return [(line.attempt, line.step) for line in tail.new_lines()]


def test_every_line_is_told_once_over_attempts_and_rollbacks(run: RunDirectory) -> None:
    tail = MetricsTail(run, Position())
    assert steps_forwarded(tail) == [], "there is no metrics folder yet"
    write(run, "1.00", 1, 2)
    assert steps_forwarded(tail) == [("1.00", 1), ("1.00", 2)]
    assert steps_forwarded(tail) == []
    write(run, "1.00", 3)
    write(run, "1.01", 2, 3)  # resumed behind step 1
    write(run, "1.10", 3)  # the tenth attempt is behind the second
    assert steps_forwarded(tail) == [("1.00", 3), ("1.01", 2), ("1.01", 3), ("1.10", 3)]
    assert tail.position == Position("1.10", 3, 6)


def test_a_line_that_is_still_being_written_waits_for_its_end(run: RunDirectory) -> None:
    write(run, "1.00", 1)
    tail = MetricsTail(run, Position())
    with run.metrics_of("1.00").open("ab") as file:
        file.write(b'{"attempt":"1.00","step":2,"ti')
        file.flush()
        assert steps_forwarded(tail) == [("1.00", 1)]
        assert steps_forwarded(tail) == []
        file.write(b'me":1.0,"loss":2.0}\n')
        file.flush()
        assert steps_forwarded(tail) == [("1.00", 2)]


def test_a_restart_begins_behind_what_was_forwarded(run: RunDirectory, tmp_path: Path) -> None:
    write(run, "1.00", 1, 2, 3)
    Position("1.00", 2, 2).write(tmp_path / "state.json")
    tail = MetricsTail(run, Position.read(tmp_path / "state.json"))
    assert steps_forwarded(tail) == [("1.00", 3)]
    assert tail.position.sent == 3


@pytest.mark.parametrize(
    "state", ["", "{", "[]", '{"attempt": "x", "step": 1, "sent": 1}', '{"attempt": "1.00"}']
)
def test_a_state_that_does_not_read_sends_all_again(
    run: RunDirectory, tmp_path: Path, state: str
) -> None:
    (tmp_path / "state.json").write_text(state)
    assert Position.read(tmp_path / "state.json") == Position()


def test_lines_that_do_not_read_are_passed_over(run: RunDirectory) -> None:
    write(run, "1.00", 1)
    with run.metrics_of("1.00").open("ab") as file:
        file.write(b"\xff\xfe not JSON\n[1]\n" + b'{"step":"2"}\n{"step":true}\n')
    write(run, "1.00", 2)
    assert steps_forwarded(MetricsTail(run, Position())) == [("1.00", 1), ("1.00", 2)]


def test_a_file_that_a_crash_made_shorter_is_read_on_from_where_it_is(run: RunDirectory) -> None:
    write(run, "1.00", 1, 2, 3)
    tail = MetricsTail(run, Position())
    assert len(steps_forwarded(tail)) == 3
    first = run.metrics_of("1.00").read_bytes().splitlines(keepends=True)[0]
    run.metrics_of("1.00").write_bytes(first)
    assert steps_forwarded(tail) == []
    write(run, "1.00", 2, 3, 4)
    assert steps_forwarded(tail) == [("1.00", 4)]


def test_words_for_numbers_that_are_not_finite_are_numbers_again() -> None:
    payload = {
        "step": 3,
        "time": 5.5,
        "loss": "NaN",
        "grad_norm": "-Infinity",
        "mfu": None,
        "skipped": True,
        "why": "x",
    }
    line = parse_line(json.dumps(payload | {"tokens": 10**400}).encode(), "1.00")
    assert line is not None
    assert math.isnan(line.values["loss"])
    assert {key: value for key, value in line.values.items() if key != "loss"} == {
        "grad_norm": -math.inf,
        "skipped": 1.0,
    }


def test_lists_are_numbers_by_place_and_those_by_layer_have_its_name() -> None:
    """A sink that takes numbers alone would not show them, or stop at the first."""
    layers = [float(place) for place in range(12)]
    payload = {
        "step": 3,
        "time": 5.5,
        "layer_grad_norms": ["Infinity", *layers, "NaN"],
        "x": [7, None, 8],
    }
    line = parse_line(json.dumps(payload).encode(), "1.00")
    assert line is not None
    assert math.isnan(line.values["layer_grad_norms/final"])
    assert {key: value for key, value in line.values.items() if not key.endswith("/final")} == {
        "layer_grad_norms/embedding": math.inf,
        **{f"layer_grad_norms/layer_{place:02d}": value for place, value in enumerate(layers)},
        "x/0": 7.0,
        "x/2": 8.0,
    }
