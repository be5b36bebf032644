"""The leaves: learned timeouts, and folding; the tables of inputs and effects."""

import re
from dataclasses import fields
from typing import Any, get_args

import pytest
from opt_logbook.record.events import CheckpointCommitted, Entry, Event, Unknown

from opt_train.run.fold import HANDLERS, fold
from opt_train.run.state import RunState
from opt_train.simulation.histories import run_history
from opt_train.supervisor import effects, inputs
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.phase_timeouts import PhaseTimeouts

CONFIG = SupervisorConfig()


def test_timeouts_are_learned_and_never_below_three_times_the_largest() -> None:
    timeouts = PhaseTimeouts(CONFIG)
    assert timeouts.limit("step", first=False) == CONFIG.step_seconds
    for _ in range(19):
        timeouts.learn("step", False, 8.0)
    assert timeouts.limit("step", first=False) == CONFIG.step_seconds
    timeouts.learn("step", False, 1.0)
    assert timeouts.limit("step", first=False) == 24.0
    timeouts.learn("step", False, 100.0)
    assert timeouts.limit("step", first=False) == 300.0
    for _ in range(30):
        timeouts.learn("data", False, 0.01)
    assert timeouts.limit("data", first=False) == CONFIG.minimum_seconds


def test_first_steps_are_learned_apart() -> None:
    """A compiling first step must not make every later hang wait for minutes, nor be taken for
    one."""
    timeouts = PhaseTimeouts(CONFIG)
    timeouts.learn("step", True, 200.0)
    for _ in range(20):
        timeouts.learn("step", False, 1.0)
    assert timeouts.limit("step", first=False) == CONFIG.minimum_seconds
    assert timeouts.limit("step", first=True) == 600.0


def test_an_unknown_kind_changes_nothing() -> None:
    state = RunState()
    assert fold(state, Entry(1.0, "", None, Unknown("later", {"a": 1}))) is state


@pytest.mark.parametrize("seed", range(40))
def test_any_prefix_and_any_gap_of_a_journal_folds(seed: int) -> None:
    """A crash cuts a journal anywhere, and a damaged line is skipped: neither may stop a supervisor
    from starting."""
    journal = run_history(seed).journal
    for gap in range(0, len(journal), 3):
        state = RunState()
        for entry in journal[:gap] + journal[gap + 1 :]:
            state = fold(state, entry)
            assert {f.name for f in fields(state)} == {f.name for f in fields(RunState())}


def test_a_commit_journalled_twice_counts_once() -> None:
    commit = Entry(1.0, "1.00", 3, CheckpointCommitted("p", "sha", 1, 1, 0.1, True))
    state = fold(fold(RunState(), commit), commit)
    assert len(state.checkpoints) == 1


def test_every_handler_is_of_a_kind_that_is_written() -> None:
    assert all(kind in Event.registry.values() for kind in HANDLERS)


@pytest.mark.parametrize(("module", "kinds"), [(effects, effects.Effect), (inputs, inputs.Input)])
def test_every_effect_and_every_input_is_in_its_file_s_table(module: Any, kinds: Any) -> None:
    """Whoever hosts the core goes by these tables."""
    rows = re.findall(r"^`(\w+)` ", module.__doc__, re.MULTILINE)
    assert rows == list(dict.fromkeys(rows))
    assert set(rows) == {kind.__name__ for kind in get_args(kinds)}
