"""Metrics by name and step, on the live chain alone: a detector's window never holds a step that
was trained on weights that are gone."""

import math
from pathlib import Path

from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig
from opt_train.run.attempt import Attempt
from opt_train.run.state import RunState
from opt_train.stability.metric_history import COLUMNS_MAX, MetricHistory
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.inputs import MetricsReceived, Now
from opt_train.supervisor.shell.start import _recalled


def a_history(steps: int, capacity: int = 8) -> MetricHistory:
    history = MetricHistory(capacity)
    for step in range(1, steps + 1):
        history.append({"step": step, "loss": 10.0 - step, "attempt": "1.00"})
    return history


def test_columns_are_asked_for_by_name_oldest_first() -> None:
    history = a_history(3)
    assert history.steps(2) == (2, 3)
    assert history.values("loss", last=2) == (8.0, 7.0)
    assert history.values("loss", last=99) == (9.0, 8.0, 7.0)
    assert history.values("grad_norm", last=2) == (None, None)
    assert history.values("attempt", last=2) == (None, None), "text is no column"
    assert history.newest("loss") == 7.0
    assert MetricHistory().values("loss", last=3) == ()
    assert MetricHistory().newest("loss") is None


def test_the_oldest_steps_fall_out() -> None:
    history = a_history(20)
    assert history.steps(99) == tuple(range(13, 21))
    assert len(history.values("loss", last=99)) == 8


def test_a_column_that_comes_late_or_fails_to_come_keeps_its_steps() -> None:
    history = a_history(2)
    history.append({"step": 3, "loss": "NaN", "grad_norm": 1.5})
    history.append({"step": 4, "loss": None, "grad_norm": "Infinity", "norms": [1.0, 2.0]})
    assert history.values("grad_norm", last=4) == (None, None, 1.5, math.inf)
    loss = history.values("loss", last=2)
    assert loss[0] is not None
    assert math.isnan(loss[0])
    assert loss[1] is None
    assert history.newest("norms") is None


def test_a_restart_forgets_the_steps_beyond_its_checkpoint() -> None:
    history = a_history(6)
    history.begin_attempt(4)
    assert history.step == -1
    assert history.newest_of_attempt("loss") is None
    assert history.steps(9) == (1, 2, 3, 4)
    assert history.newest("loss") == 6.0
    history.append({"step": 5, "loss": 0.5})
    assert history.step == 5
    assert history.values("loss", last=2) == (6.0, 0.5)
    history.begin_attempt(0)
    assert (history.steps(9), history.newest("loss")) == ((), None)


def test_a_rollback_in_place_forgets_the_steps_beyond_its_target() -> None:
    history = a_history(6)
    history.forget_beyond(2)
    assert history.step == 2
    assert history.values("loss", last=9) == (9.0, 8.0)


def test_names_that_never_end_do_not_take_the_memory() -> None:
    history = MetricHistory()
    for step in range(1, 2 * COLUMNS_MAX):
        history.append({"step": step, f"column{step}": 1.0})
    assert len(history._columns) == COLUMNS_MAX


def test_a_new_supervisor_is_told_the_live_chain_s_newest_steps(tmp_path: Path) -> None:
    """Attempt 1.00 reached step 9, 1.01 went on from step 6, and 1.02 from step 8."""
    run = RunDirectory(tmp_path)
    with MetricsWriter(run) as writer:
        for name, steps in (("1.00", range(1, 10)), ("1.01", range(7, 12)), ("1.02", (9, 10))):
            for step in steps:
                writer.append(name, {"step": step, "loss": float(name) * 100 + step})
    chain = {"1.00": ("", 0), "1.01": ("1.00", 6), "1.02": ("1.01", 8)}
    attempt = Attempt("1.02", 3, 8, ("n0",), 1)
    state = RunState(attempt=attempt, generation=3, history=chain)
    recalled = _recalled(run, state)
    assert recalled is not None
    view = ClusterView(RunConfig(), Now(0.0, 0.0))
    view.apply_input(recalled, Now(1.0, 1.0), state)
    assert view.training.history.steps(99) == tuple(range(1, 11))
    values = view.training.history.values("loss", last=99)
    assert values == (*(100.0 + s for s in range(1, 7)), 108.0, 109.0, 111.0, 112.0)
    assert view.training.history.step == 10
    again = MetricsReceived("n0", 3, {"step": 10, "loss": 0.0})
    assert not view.training.is_new_line(again, state)


def test_nothing_is_recalled_where_no_attempt_may_live(tmp_path: Path) -> None:
    over = Attempt("1.00", 1, 0, ("n0",), 1, outcome="failed")
    assert _recalled(RunDirectory(tmp_path), RunState(attempt=over)) is None
