"""What the loss scale and the embedding's gradient raise an alarm about, and what not: the real
loss scale on made gradients."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import parameter_count
from opt_train.optim.config import OptimConfig
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.config import PrecisionConfig
from opt_train.stability.detectors import Alarm, Detectors
from opt_train.stability.gradient_scales import LEAST, VANISHING
from opt_train.stability.ladder import Rung, answer
from opt_train.stability.metric_history import MetricHistory

FITS = 2.0**10
"""The largest scale that the gradients of a healthy run take."""
OVERFLOWED = {"overflow": True, "skipped": True, "grad_norm": math.inf}
Fits = Callable[[int], float]


def config_of(**precision: Any) -> RunConfig:
    return RunConfig(precision=PrecisionConfig(compute="fp16", **precision))


def lines(
    config: RunConfig,
    steps: int,
    fits: Fits,
    seed: int = 1,
    *,
    tail: float = 0.5,
    zero_below: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Metrics of a run in fp16 whose gradients overflow above `fits` of a step, and are zero below
    `zero_below`."""
    draw, policy = random.Random(seed), policy_of(config.precision)
    scale = LossScale(policy, torch.device("cpu"))
    for step in range(1, steps + 1):
        now = scale.scale.item()
        # The largest gradient of a batch has a tail: now and then even a scale that fits does not.
        overflow = now > fits(step) * 2.0 ** draw.gauss(0, tail)
        norm = 0.0 if now < zero_below else math.exp(draw.gauss(0, 0.3))
        yield {
            "step": step,
            "loss": 8.0 * (step + 5) ** -0.2 + draw.gauss(0, 0.05),
            "grad_norm": math.inf if overflow else norm,
            "overflow": overflow,
            "skipped": overflow,
            "loss_scale": now,
            "loss_scale_floor": policy.floor,
            "embedding_grad_ratio": math.nan if overflow else math.exp(draw.gauss(0, 0.3)),
        }
        scale.update(torch.tensor(float(overflow)))


def alarms_of(config: RunConfig, metrics: Any) -> dict[str, Alarm]:
    detectors = Detectors(config)
    for line in metrics:
        detectors.append(line)
    return detectors.alarms


def always(fits: float) -> Fits:
    return lambda step: fits


HEALTHY = {
    "metaseq": config_of(),
    "metaseq from 2^12": config_of(loss_scale_initial=2.0**12),
    "metaseq, short window": config_of(loss_scale_window_steps=8),
    "megatron": config_of(loss_scale="megatron"),
    "megatron, short window": config_of(loss_scale="megatron", loss_scale_window_steps=16),
    "megatron, doubled each second step": config_of(
        loss_scale="megatron", loss_scale_window_steps=2
    ),
    "fixed": config_of(loss_scale="fixed", loss_scale_initial=2.0**6),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_scale_that_finds_its_place_raises_none(name: str) -> None:
    """Also from megatron's 2^32, on whose way down every step is left out."""
    config = HEALTHY[name]
    overflows = 0
    for seed in range(5):
        metrics = list(lines(config, 1500, always(FITS), seed))
        overflows += sum(line["overflow"] for line in metrics)
        assert alarms_of(config, metrics) == {}
    assert (overflows > 0) is (name not in ("fixed", "metaseq")), "else it tells nothing"


def test_gradients_that_grow_with_training_raise_none() -> None:
    """A hundred times in 1,500 steps: the scale follows, an overflow at a time."""
    config = config_of(loss_scale="megatron", loss_scale_window_steps=100)
    assert alarms_of(config, lines(config, 1500, lambda step: FITS * 100 ** (-step / 1500))) == {}


def test_overflows_at_a_scale_that_worked_are_a_collapse() -> None:
    config = config_of(loss_scale_initial=2.0**9, loss_scale_floor=2.0**-24)
    fits = lambda step: FITS if step <= 200 else 0.0  # noqa: E731
    [alarm] = alarms_of(config, lines(config, 215, fits, tail=0.0)).values()
    assert (alarm.name, alarm.step, alarm.scale) == ("loss_scale_collapse", 208, 2.0**9)
    assert alarm.what == ("8 steps in a row overflowed, and the loss scale fell from 512 to 4")


def test_at_its_floor_it_can_fall_no_further() -> None:
    config = config_of(loss_scale_initial=2.0**4, loss_scale_floor=2.0)
    fits = lambda step: 2.0**5 if step <= 200 else 0.0  # noqa: E731
    [alarm] = alarms_of(config, lines(config, 207, fits, tail=0.0)).values()
    # 16, 8, 4, and then three times 2.
    assert (alarm.name, alarm.step, alarm.scale) == ("loss_scale_floor", 206, 16.0)


def test_a_floor_that_is_too_high_is_seen_before_any_step_was_taken() -> None:
    config = config_of(loss_scale_initial=2.0**24, loss_scale_floor=2.0**22)
    [alarm] = alarms_of(config, lines(config, 10, always(FITS))).values()
    assert (alarm.name, alarm.step, alarm.scale) == ("loss_scale_floor", 5, 0.0)
    found = answer(alarm, 0, 4)
    assert (found.rung, found.loss_scale, found.loss_scale_floor) == (
        Rung.RESCALE,
        2.0**8,
        2.0**-5,
    )


def test_a_window_that_has_shrunk_to_a_step_leaves_out_every_second() -> None:
    """metaseq's window halves with each overflow, and from a first scale that is far too high
    nothing of it is left: it then doubles after each step that fits."""
    config = config_of(loss_scale_initial=2.0**24)
    metrics = list(lines(config, 200, always(FITS)))
    assert sum(line["skipped"] for line in metrics[50:]) > 60
    alarms = alarms_of(config, metrics)
    assert [*alarms] == ["loss_scale_skips"]
    assert 2.0**8 <= alarms["loss_scale_skips"].scale <= 2.0**11


def test_gradients_that_are_zero_with_nothing_that_overflows() -> None:
    config = config_of(loss_scale="fixed", loss_scale_initial=2.0**-12)
    [alarm] = alarms_of(config, lines(config, 20, always(FITS), zero_below=1.0)).values()
    assert (alarm.name, alarm.step, alarm.scale) == ("underflow", 4, 0.0)


def test_gradients_most_of_which_are_smaller_than_any_number_of_fp16() -> None:
    vanishing = config_of(loss_scale="fixed", loss_scale_initial=2.0**-12)
    elements = math.sqrt(parameter_count(vanishing.model))
    # Of a gradient whose norm is 1, as those of `lines` are about.
    assert 2.0**-12 / elements < 2 * LEAST < 2.0**-6 / elements
    [alarm] = alarms_of(vanishing, lines(vanishing, 20, always(FITS))).values()
    assert (alarm.name, alarm.step) == ("partial_underflow", VANISHING)
    # It has never worked, though steps were taken with it: they are given up.
    found = answer(alarm, 0, 4)
    assert (found.rung, found.loss_scale) == (Rung.RESCALE_BACK, 2.0**8)
    assert answer(alarm, 1, 4).rung is Rung.HAND_OVER
    fits = config_of(loss_scale="fixed", loss_scale_initial=2.0**-6)
    assert alarms_of(fits, lines(fits, 200, always(FITS))) == {}
    # bf16 has smaller numbers.
    unscaled = RunConfig(precision=PrecisionConfig(compute="bf16"))
    assert alarms_of(unscaled, lines(vanishing, 20, always(FITS))) == {}


def test_a_forward_pass_that_is_not_finite_is_no_matter_of_the_scale() -> None:
    config = config_of(loss_scale_initial=2.0**9)
    metrics = list(lines(config, 230, lambda step: FITS if step <= 200 else 0.0))
    for line in metrics[200:]:
        line["loss"] = math.nan
    alarms = alarms_of(config, metrics)
    assert {name: alarm.step for name, alarm in alarms.items()} == {"forward_overflow": 203}
    assert [answer(alarms["forward_overflow"], acts, 4).rung for acts in range(3)] == [
        Rung.REPLAY,
        Rung.LOWER_LR,
        Rung.HAND_OVER,
    ]
    assert answer(alarms["forward_overflow"], 1, 4).lr_factor == pytest.approx(0.3)


def test_a_scale_that_was_set_is_counted_anew() -> None:
    """Seven overflows, the order, one more: that is no row of eight."""
    config = config_of(loss_scale_initial=2.0**9)
    metrics = list(lines(config, 260, always(FITS), tail=0.0))
    for number, line in enumerate(metrics[200:207]):
        line.update(OVERFLOWED | {"loss_scale": 2.0 ** (9 - number)})
    metrics[207] |= OVERFLOWED | {"loss_scale": 2.0**9}
    for line in metrics[208:]:
        line["loss_scale"] = 2.0**8
    assert alarms_of(config, metrics) == {}
    for number, line in enumerate(metrics[208:215], start=1):
        line.update(OVERFLOWED | {"loss_scale": 2.0 ** (9 - number)})
    assert [*alarms_of(config, metrics[:215])] == ["loss_scale_collapse"]


# The embedding ------------------------------------------------------------------------------------

BF16 = RunConfig(precision=PrecisionConfig(compute="bf16"))


def drowned(times: float, steps: range, skipped: int = 0) -> list[dict[str, Any]]:
    """A healthy run but for `steps`, on which the embedding's gradient is so many times as large;
    the first `skipped` of them are left out."""
    metrics = list(lines(BF16, 400, always(FITS)))
    for line in metrics:
        line |= {"overflow": False, "skipped": False, "loss_scale": 1.0, "loss_scale_floor": None}
        if not math.isfinite(line["embedding_grad_ratio"]):
            line["embedding_grad_ratio"] = 1.0
    for number, step in enumerate(steps):
        metrics[step - 1]["embedding_grad_ratio"] *= times
        metrics[step - 1]["skipped"] = number < skipped
    return metrics


@pytest.mark.parametrize("seed", range(10))
def test_an_embedding_as_usual_raises_none(seed: int) -> None:
    assert alarms_of(BF16, lines(BF16, 600, always(math.inf), seed)) == {}


@pytest.mark.parametrize(
    ("times", "steps"),
    [(1000.0, range(200, 202)), (8.0, range(200, 400)), (1000.0, range(20, 60))],
)
def test_a_moment_a_little_or_the_first_steps_raise_none(times: float, steps: range) -> None:
    assert alarms_of(BF16, drowned(times, steps)) == {}


def test_an_embedding_that_drowns_the_rest_is_measured() -> None:
    """Before the outliers that it makes, whose answer would not help."""
    detectors = Detectors(BF16)
    for line in drowned(1000.0, range(200, 260), skipped=4):
        detectors.append(line)
    first, second = sorted(detectors.alarms.values(), key=lambda alarm: alarm.step)
    assert [(a.name, a.step) for a in (first, second)] == [
        ("embedding_gradient", 202),
        ("outliers", 203),
    ]
    assert first.ratio == pytest.approx(1000.0, rel=0.5)
    found = answer(first, 1, 4)
    assert (found.rung, found.embedding_factor) == (Rung.SHRINK_EMBEDDING, 1 / first.ratio)
    hasty = replace(BF16, optim=OptimConfig(skip_in_row=2))
    assert (
        min(
            alarms_of(hasty, drowned(1000.0, range(200, 260), 2)).values(),
            key=lambda alarm: alarm.step,
        ).name
        == "embedding_gradient"
    )


def test_a_rollback_takes_back_what_was_learnt_of_scales() -> None:
    config = config_of(loss_scale_initial=2.0**9, loss_scale_floor=2.0**-24)
    metrics = list(lines(config, 215, lambda step: FITS if step <= 200 else 0.0))
    history, detectors = MetricHistory(), Detectors(config)
    for line in metrics:
        history.append(line)
        detectors.append(line)
    first = detectors.alarms["loss_scale_collapse"]
    history.begin_attempt(190)
    detectors.rebuild(history)
    assert detectors.alarms == {}
    for line in metrics[190:]:
        detectors.append(line)
    assert replace(detectors.alarms["loss_scale_collapse"], samples=0) == replace(first, samples=0)
