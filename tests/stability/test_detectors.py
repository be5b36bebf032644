"""What raises an alarm and what does not, on made metrics."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.optim.config import OptimConfig
from opt_train.parallel.config import PrecisionConfig
from opt_train.stability.detectors import Detectors
from opt_train.stability.level import REFUSED_BEFORE_NEW
from opt_train.stability.metric_history import MetricHistory

STEPS = 400
CONFIG = RunConfig(precision=PrecisionConfig(compute="bf16"))
FP16 = RunConfig(precision=PrecisionConfig(compute="fp16"))


def healthy(steps: int = STEPS, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Metrics of a run that goes well: the loss falls, and both are noisy."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        yield {
            "step": step,
            "loss": 8.0 * (step + 5) ** -0.2 + draw.gauss(0, 0.05),
            "grad_norm": math.exp(draw.gauss(0, 0.3)),
            "update_ratio": 1e-3 * math.exp(draw.gauss(0, 0.1)) * min(1.0, step / 50),
            "lr": 1e-3,
            "skipped": False,
            "overflow": False,
        }


def alarms_of(lines: Any, config: RunConfig = CONFIG) -> dict[str, int]:
    """Name -> step of what is raised."""
    detectors = Detectors(config)
    for line in lines:
        detectors.append(line)
    return {name: alarm.step for name, alarm in detectors.alarms.items()}


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_goes_well_raises_none(seed: int) -> None:
    assert alarms_of(healthy(seed=seed)) == {}


def test_single_spikes_and_overflows_raise_none() -> None:
    """Real runs have them: a spike that recovers, a loss scale that finds its place."""
    lines = list(healthy())
    for step in (150, 220, 221, 222, 300):
        lines[step]["loss"] *= 2
    for step in (120, 121, 122, 123, 124):
        lines[step] |= {"grad_norm": math.inf, "skipped": True, "overflow": True}
    for step in (180, 181, 182):
        lines[step] |= {"skipped": True, "grad_norm": 90.0}
    assert alarms_of(lines, FP16) == {}
    # Without a loss scale there is nothing that may overflow.
    assert alarms_of(lines) == {"non_finite": 123}


@pytest.mark.parametrize("times", [0.01, 10.0])
def test_updates_of_another_size_are_seen_at_once_and_measured(times: float) -> None:
    lines = list(healthy())
    for line in lines[199:]:
        line["update_ratio"] *= times
    detectors = Detectors(CONFIG)
    for line in lines[:200]:
        detectors.append(line)
    [alarm] = detectors.alarms.values()
    assert alarm.name == ("update_jump" if times > 1 else "frozen")
    assert alarm.step == 200
    assert alarm.ratio == pytest.approx(times, rel=0.5)


@pytest.mark.parametrize("times", [0.01, 100.0])
def test_a_rate_that_was_changed_is_no_trouble(times: float) -> None:
    """Nor is one that puts right what is wrong: the updates are then as large as ever."""
    changed, mended = list(healthy()), list(healthy())
    for line, before in zip(changed[199:], changed[198:], strict=False):
        line["lr"] *= times
        line["update_ratio"] *= before["lr"] / 1e-3
    for line in mended[199:]:
        line["lr"] *= times
    assert alarms_of(changed) == alarms_of(mended) == {}


def test_a_loss_that_rises_is_seen_within_some_steps() -> None:
    lines = list(healthy())
    for line in lines[199:]:
        line["loss"] += 0.4
    assert 204 <= alarms_of(lines)["rise"] <= 212


def test_a_slow_rise_is_measured_by_the_best_there_was() -> None:
    """Over 300 steps: a window of the last ones would learn each as normal."""
    lines = list(healthy())
    for line in lines[99:]:
        line["loss"] += 0.8 * (line["step"] - 100) / 300
    assert "rise" in alarms_of(lines)


def test_outliers_and_what_is_not_finite_count_in_a_row() -> None:
    lines = list(healthy())
    for step in (200, 201, 202, 203):
        lines[step]["skipped"] = True
    for step in (300, 301, 302):
        lines[step] |= {"loss": math.nan, "skipped": True}
    assert alarms_of(lines) == {"outliers": 204, "non_finite": 303}
    patient = replace(CONFIG, optim=OptimConfig(skip_in_row=5))
    assert alarms_of(lines, patient) == {"non_finite": 303}


def test_a_level_that_lasts_is_the_new_one() -> None:
    """A person has lowered the learning rate: it alarms once, and not for ever."""
    lines = list(healthy(600))
    for line in lines[199:]:
        line["update_ratio"] *= 0.01
    detectors = Detectors(CONFIG)
    for line in lines[: 200 + REFUSED_BEFORE_NEW + 100]:
        detectors.append(line)
    detectors.alarms.clear()
    for line in lines[200 + REFUSED_BEFORE_NEW + 100 :]:
        detectors.append(line)
    assert detectors.alarms == {}


def test_a_rollback_takes_back_what_was_learnt() -> None:
    """The same trouble is seen again at the same step."""
    lines, history, detectors = list(healthy()), MetricHistory(), Detectors(CONFIG)
    for line in lines[199:]:
        line["loss"] += 0.4
    for line in lines[:300]:
        history.append(line)
        detectors.append(line)
    first = detectors.alarms["rise"].step
    history.begin_attempt(190)
    detectors.rebuild(history)
    assert detectors.alarms == {}
    for line in lines[190:300]:
        detectors.append(line)
    assert detectors.alarms["rise"].step == first
