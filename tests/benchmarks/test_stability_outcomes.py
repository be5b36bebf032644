"""What the benchmark of sick runs makes of a run directory, by hand-made ones."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.event import Event
from opt_logbook.record.events import (
    Entry,
    IncidentDiagnosed,
    RunFinished,
    RunHalted,
    RunStopped,
    ValidationMeasured,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from benchmarks.stability.outcomes import (
    HANDED_OVER,
    LOST,
    RESCUED,
    VAGUE,
    Act,
    Result,
    delay,
    excess,
    extra_share,
    false_acts,
    false_skips,
    is_sick,
    outcome_of,
    read_run,
    rung_that_worked,
)
from benchmarks.stability.settings import ALONE, OURS, Base, Family, Run
from benchmarks.stability.table import NOT_SICK, healthy_of, page, row_of

FAMILY = Family(name="late rate", kind="LR late", onset=0.4, names=("update_jump",))
TWIN = 2.0


@dataclass
class Made:
    """A run directory that is being made."""

    run: RunDirectory
    entries: list[Entry]

    def event(self, event: Event, step: int | None = None, attempt: str = "1.00") -> None:
        self.entries.append(Entry(float(len(self.entries)), attempt, step, event))

    def seen(self, step: int, alarm: str, rung: str) -> None:
        self.event(InstabilitySeen(1, alarm, "something", rung, "so", "that", 3.0), step)

    def finished(self, loss: float, step: int = 10) -> None:
        self.event(ValidationMeasured("validation", loss, math.exp(loss), 100), step)
        self.event(ValidationMeasured("another set", 9.0, 9.0, 100), step)
        self.event(RunFinished(2.0, math.exp(loss), 100, 1.0), step)

    def steps(self, attempt: str, first: int, last: int, **more: Any) -> None:
        with MetricsWriter(self.run) as writer:
            for step in range(first, last + 1):
                line = {"step": step, "loss": 2.0, "grad_norm": 1.0, "skipped": False}
                writer.append(attempt, {**line, **more})

    def read(self, **more: Any) -> Result:
        with Lock.acquire(self.run) as lock, Journal.open(self.run, lock) as journal:
            for entry in self.entries:
                journal.append(entry)
        result = read_run(self.run, **more)
        # What is kept in a file is what was read.
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
        return result


@pytest.fixture
def made(tmp_path: Path) -> Made:
    run = RunDirectory(tmp_path)
    return Made(run, [])


def test_steps_trained_again_are_extra_and_the_twins_loss_is_the_measure(made: Made) -> None:
    made.steps("1.00", 1, 6)
    made.seen(6, "update_jump", "replay")
    made.steps("1.01", 4, 7)
    made.seen(7, "update_jump", "lower_lr")
    made.steps("1.02", 4, 10)
    made.event(InstabilityClosed(1, "helped", "it is"), 10)
    made.finished(2.03)
    result = made.read()
    # 6 + 4 + 7 batches for a plan of 10.
    assert result.steps_taken == 17
    assert extra_share(result, 10) == pytest.approx(0.7)
    assert excess(result, TWIN) == pytest.approx(0.015)
    assert outcome_of(result, TWIN, FAMILY) == RESCUED
    # The fifth batch, number 4, was the first sick one; the metrics' sixth step says so.
    assert delay(result, onset=4) == 1
    assert rung_that_worked(result, onset=4) == "lower_lr"
    assert result.outcomes == ("helped",)


def test_two_per_cent_are_the_border(made: Made) -> None:
    made.steps("1.00", 1, 10)
    made.finished(2.05)
    result = made.read()
    assert outcome_of(result, TWIN, FAMILY) == LOST
    assert is_sick(result, TWIN)
    assert not is_sick(result, 2.04)
    assert delay(result, onset=4) is None
    assert rung_that_worked(result, onset=4) == ""


def test_a_stop_that_names_the_cause_is_handed_over_and_any_other_is_vague(made: Made) -> None:
    made.steps("1.00", 1, 6)
    made.seen(6, "update_jump", "hand_over")
    made.event(RunStopped("training is unstable and a person must decide: so", 3))
    result = made.read()
    assert result.validation is None
    assert math.isinf(excess(result, TWIN))
    assert outcome_of(result, TWIN, FAMILY) == HANDED_OVER
    other = Family(name="x", kind="x", names=("frozen",))
    assert outcome_of(result, TWIN, other) == VAGUE


def test_a_halt_names_its_incidents_cause(made: Made) -> None:
    made.event(IncidentDiagnosed(1, "loss_scale_floor", "run", "", 1.0, "", -1, (), "wait"), step=6)
    made.event(RunHalted("what now", "loss_scale_floor"))
    result = made.read()
    assert rung_that_worked(result, onset=4) == "restart"
    assert (
        healthy_of([(Run(base=Base(seed=0), steps=10, control=OURS), result, None)]).incidents == 1
    )
    named = Family(name="x", kind="x", names=("loss_scale_floor",))
    assert outcome_of(result, TWIN, named) == HANDED_OVER


def test_a_probes_verdict_names_bad_data() -> None:
    data = Family(name="x", kind="x", names=("bad data",))
    signs = (Act(6, "outliers", "replay"), Act(6, "outliers", "hand_over"))
    stopped = Result(end="stopped", validation=None, steps_taken=6, acts=signs)
    assert outcome_of(stopped, TWIN, data) == VAGUE
    probed = Result(
        end="stopped", validation=None, steps_taken=6, acts=signs, verdicts=("bad data",)
    )
    assert outcome_of(probed, TWIN, data) == HANDED_OVER


def test_a_loss_that_is_no_number_is_lost(made: Made) -> None:
    made.steps("1.00", 1, 10, grad_norm=math.nan, skipped=True)
    made.finished(math.nan)
    result = made.read()
    assert result.overflows == 10
    assert result.skipped == ()
    assert outcome_of(result, TWIN, FAMILY) == LOST
    assert is_sick(result, TWIN)


def test_what_happens_before_there_is_a_reason_is_false(made: Made) -> None:
    made.steps("1.00", 1, 3)
    made.steps("1.00", 4, 4, skipped=True)
    made.steps("1.00", 5, 6)
    made.steps("1.01", 2, 3, skipped=True)
    made.seen(3, "rise", "replay")
    made.seen(6, "update_jump", "replay")
    # A relapse in data that was moved forward: not the first that was right, and not false.
    made.seen(4, "rise", "skip")
    made.finished(2.0)
    result = made.read()
    assert false_acts(result, onset=5) == 1
    assert false_acts(result) == 3
    # Of the first attempt alone: what is trained again is other data at those steps.
    assert false_skips(result, onset=5) == 1
    assert false_skips(result) == 3
    assert false_skips(result, odd_batches=[3]) == 2
    assert delay(result, onset=5) == 0


def test_an_odd_batch_that_is_left_out_is_no_false_skip(made: Made) -> None:
    made.steps("1.00", 1, 9)
    made.steps("1.00", 10, 10, skipped=True)
    made.finished(2.0)
    result = made.read(odd_batches=[9])
    run = Run(base=Base(seed=0), steps=10, control=OURS, odd_batches=(9,))
    sums = healthy_of([(run, result, None)])
    assert (sums.odd_batches, sums.odd_batches_skipped, sums.false_skips) == (1, 1, 0)
    assert sums.steps == 10


def test_who_was_thought_healthy_and_ends_worse_left_alone_was_sick() -> None:
    run = Run(base=Base(seed=0), steps=10, control=OURS)
    acts = (Act(6, "ceiling_at_start", "restart"),)
    ours = Result(end="finished", validation=2.0, steps_taken=12, acts=acts)
    as_well, worse, stopped = (
        Result(end=end, validation=loss, steps_taken=10)
        for end, loss in (("finished", 2.03), ("finished", 2.1), ("stopped", None))
    )
    assert healthy_of([(run, ours, as_well)]).false_acts == 1
    sums = healthy_of([(run, ours, worse)])
    assert (sums.runs, sums.steps, sums.false_acts) == (0, 0, 0)
    assert sums.sick == {run.base.name: pytest.approx(0.05)}
    text = page("tuning", 10, [], healthy_of([(run, ours, worse), (run, ours, as_well)]), [OURS])
    assert f"thought healthy, {run.base.name}: left alone it ends +5.0 % from ours" in text
    assert "1 false acts and 0 false skips in 12 steps of 1 runs" in text
    # Whoever was stopped is no proof of anything but itself.
    assert healthy_of([(run, replace(ours, validation=None), stopped)]).false_acts == 1


def test_a_setting_that_is_not_sick_is_said_to_be_none_and_not_counted() -> None:
    base, steps = Base(seed=0), 10
    well = Result(end="finished", validation=2.01, steps_taken=10)
    ill = Result(end="finished", validation=2.5, steps_taken=10)
    saved = Result(
        end="finished",
        validation=2.0,
        steps_taken=12,
        acts=(Act(6, "update_jump", "replay"),),
    )
    rows = [
        row_of(FAMILY, base, steps, TWIN, {ALONE: well, OURS: well}),
        row_of(FAMILY, base, steps, TWIN, {ALONE: ill, OURS: saved}),
    ]
    assert [row.is_sick for row in rows] == [False, True]
    assert rows[0].outcomes[ALONE] == NOT_SICK
    text = page("tuning", steps, rows, healthy_of([]), [ALONE, OURS])
    assert "1 sick settings of 1 kinds, 1 of them curable." in text
    assert "Not sick when left alone, and not counted: late rate" in text
    assert "ours: 1 of 1 rescued" in text
    assert "alone: 0 of 1 rescued" in text
    assert "mean 20.0 %, most 20.0 %" in text
    assert "of the curable 100 % rescued (at least 95 %), of all 0 % lost" in text
