"""Two writers keep a run's journal, a supervisor and a standalone run: what they say of the same
thing must be the same bytes. A loss of 800 once had the perplexity `inf` in one and 1e304 in the
other."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opt_logbook.record.events import ValidationMeasured

from opt_train.protocol.facts import Validation
from opt_train.run import entries, standalone
from opt_train.run.attempt import Attempt
from opt_train.run.entries import (
    EXPONENT_MAX,
    perplexity_of,
    run_finished,
    training_began,
    validation_measured,
)
from opt_train.run.standalone import StandaloneRun
from opt_train.run.state import RunState
from opt_train.supervisor.rules import attempts, checkpoints, snapshots

SHARED = (
    "attempt_started",
    "checkpoint_committed",
    "run_finished",
    "training_began",
    "validation_measured",
)
"""Builders of what both writers say."""


def from_supervisor(loss: float) -> ValidationMeasured:
    fact = Validation("validation", 4, loss, 100)
    context: Any = SimpleNamespace(
        generation=SimpleNamespace(validations={("validation", 4): fact}),
        state=SimpleNamespace(validations={}),
    )
    [decision] = attempts.report_validation(context)
    return cast(ValidationMeasured, cast(Any, decision).event)


def from_standalone(loss: float, monkeypatch: pytest.MonkeyPatch) -> ValidationMeasured:
    events: list[Any] = []
    monkeypatch.setattr(
        StandaloneRun, "_append", lambda _self, event, step=None: events.append(event)
    )
    writer = StandaloneRun.__new__(StandaloneRun)
    writer._report = lambda _sentence: None
    writer.record(0, Validation("validation", 4, loss, 100))
    [event] = events
    return cast(ValidationMeasured, event)


@pytest.mark.parametrize("loss", [0.0, 2.5, 700.0, 709.5, 800.0, math.inf])
def test_both_writers_say_the_same_finite_perplexity(
    loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = from_supervisor(loss)
    assert event == from_standalone(loss, monkeypatch)
    assert math.isfinite(event.perplexity)
    assert event.perplexity == math.exp(min(loss, EXPONENT_MAX))


def test_a_loss_that_is_no_number_has_no_perplexity() -> None:
    assert math.isnan(perplexity_of(math.nan))
    assert math.isnan(validation_measured("validation", math.nan, 1).perplexity)


@pytest.mark.parametrize("name", SHARED)
def test_what_both_writers_say_is_built_in_one_place(name: str) -> None:
    """Neither names the class of such an event, so that neither can fill it in its own way."""
    builder = getattr(entries, name)
    made = builder.__annotations__["return"].__name__
    assert getattr(standalone, name) is builder
    rules = [module for module in (attempts, checkpoints, snapshots) if hasattr(module, name)]
    assert rules
    assert all(getattr(module, name) is builder for module in rules)
    assert not any(hasattr(module, made) for module in (standalone, attempts, checkpoints))


def test_a_clock_that_was_set_back_makes_no_time_negative() -> None:
    attempt = Attempt("1.00", 1, 0, ("n0",), 1, started=100.0)
    assert training_began(attempt, 40.0).seconds == 0.0
    finished = run_finished(RunState(created_time=100.0), 2.0, 10, 40.0)
    assert finished.seconds == 0.0
    assert math.isnan(finished.validation_perplexity)
