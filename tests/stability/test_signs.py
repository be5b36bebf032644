"""Ceilings, jumps, losses that fall too well or not at all: what raises an alarm on made metrics,
and what does not."""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from opt_train.clusters.config import ClusterConfig
from opt_train.config.run_config import RunConfig
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from opt_train.optim.config import OptimConfig
from opt_train.optim.update_ratio import SAMPLE, UpdateRatio
from opt_train.parallel.config import PrecisionConfig
from opt_train.stability import update_scale
from opt_train.stability.detectors import Alarm, Detectors
from opt_train.stability.metric_history import MetricHistory
from opt_train.stability.signs import SIGNS
from opt_train.train.config import TrainConfig

STEPS = 1000
MODEL = ModelConfig(layers=2, heads=2, d_model=64, ffn=256, vocab_size=512, positions=64)
CONFIG = RunConfig(
    model=MODEL,
    precision=PrecisionConfig(compute="bf16"),
    optim=OptimConfig(warmup_steps=50),
    cluster=ClusterConfig(nodes=1, slots_per_node=1),
)


def healthy(steps: int = STEPS, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Metrics of a run that goes well, as noisy as those of batches of 256 tokens."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        rate = min(1.0, step / 50)
        yield {
            "step": step,
            "loss": 2.0 + 4.2 * (step + 5) ** -0.25 + draw.gauss(0, 0.2),
            "grad_norm": math.exp(draw.gauss(0, 0.3)),
            "update_ratio": 1e-3 * math.exp(draw.gauss(0, 0.1)) * rate,
            "activation_norm": (1 + step / 100) * math.exp(draw.gauss(0, 0.05)),
            "attention_logit": (0.3 + step / 200) * math.exp(draw.gauss(0, 0.15)),
            "lr": 1e-3 * rate,
            "samples": 8 * step,
            "skipped": False,
            "overflow": False,
        }


def alarms_of(lines: Iterable[dict[str, Any]], config: RunConfig = CONFIG) -> dict[str, Alarm]:
    detectors = Detectors(config, SIGNS)
    for line in lines:
        detectors.append(line)
    return detectors.alarms


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_goes_well_raises_none(seed: int) -> None:
    assert alarms_of(healthy(seed=seed)) == {}


def test_a_run_of_an_older_version_has_no_such_columns() -> None:
    lines = list(healthy(200))
    for line in lines:
        del line["attention_logit"]
        line["activation_norm"] = None
    assert alarms_of(lines) == {}


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("activation_norm", 12 * 8 + 0.5, "the activation norm is 96.5, above 96.0, 12 for each"),
        ("attention_logit", 50.5, "the largest attention logit is 50.5, above 50"),
        ("attention_logit", "Infinity", "the largest attention logit is inf, above 50"),
    ],
)
def test_a_ceiling_at_the_start_and_by_how_much_the_rate_is_too_high(
    column: str, value: Any, what: str
) -> None:
    lines = list(healthy(30))
    for line in lines:
        # In proportion to the rate, which the warm-up raises for 50 steps.
        line["update_ratio"] = 0.004 * line["step"] / 50
    lines[19][column] = value
    [alarm] = alarms_of(lines).values()
    assert (alarm.name, alarm.step, alarm.samples) == ("ceiling_at_start", 20, 160)
    assert alarm.what.startswith(what)
    assert alarm.ratio == pytest.approx(0.004 * update_scale.whole_over_sample(CONFIG) / 0.012)


def test_just_below_the_ceilings_there_is_none() -> None:
    lines = list(healthy(150))
    for line in lines[:99]:
        line |= {"activation_norm": 95.0, "attention_logit": 49.0}
    for line in lines[99:]:
        line |= {"activation_norm": 110.0, "attention_logit": 99.0}
    assert alarms_of(lines) == {}


def test_a_model_that_was_trained_before_may_begin_above() -> None:
    lines = list(healthy(300))
    for line in lines:
        line |= {"activation_norm": 400.0, "attention_logit": 130.0}
    config = replace(CONFIG, train=TrainConfig(initial_weights="weights"))
    assert alarms_of(lines, config) == {}


def test_later_the_ceiling_counts_for_who_comes_from_below() -> None:
    lines = list(healthy(600))
    for line in lines:
        line["attention_logit"] = 0.25 * line["step"]
    [alarm] = alarms_of(lines).values()
    assert (alarm.name, alarm.step) == ("ceiling", 401)
    slow = replace(CONFIG, optim=OptimConfig(warmup_steps=500))
    assert list(alarms_of(lines, slow)) == ["ceiling_at_start"], "younger than the warm-up"


@pytest.mark.parametrize("column", ["activation_norm", "attention_logit"])
def test_a_jump_is_seen_at_once_and_does_not_blind_for_the_next(column: str) -> None:
    lines = list(healthy(300))
    for step in (200, 201, 250):
        lines[step - 1][column] *= 12
    detectors = Detectors(CONFIG, SIGNS)
    seen = []
    for line in lines:
        detectors.append(line)
        seen += [(alarm.name, alarm.step) for alarm in detectors.alarms.values()]
        detectors.alarms.clear()
    name = {"activation_norm": "activation_jump", "attention_logit": "logit_jump"}[column]
    assert seen == [(name, 200), (name, 201), (name, 250)]


def test_data_that_is_too_easy_is_seen_and_a_warm_up_is_not() -> None:
    lines = list(healthy(600))
    for line in lines[399:]:
        line["loss"] -= 1.5 * min(1.0, (line["step"] - 399) / 10)
    [alarm] = alarms_of(lines).values()
    assert alarm.name == "falls_too_well"
    assert 405 <= alarm.step <= 415
    falling = list(healthy(180))
    for line in falling:
        line["loss"] = 9 - 6 * line["step"] / 180
    assert list(alarms_of(falling)) == ["falls_too_well"]
    assert alarms_of(falling, replace(CONFIG, optim=OptimConfig(warmup_steps=200))) == {}


@pytest.mark.parametrize(("times", "names"), [(1.49, []), (1.51, ["initialisation"])])
def test_a_first_loss_far_above_that_of_a_guess(times: float, names: list[str]) -> None:
    lines = list(healthy(20))
    lines[0]["loss"] = times * math.log(512)
    lines[5]["loss"] = 20.0
    assert list(alarms_of(lines)) == names


@pytest.mark.parametrize(
    ("lr", "decay", "names"),
    [
        (6e-3, 100.0, ["weight_decay"]),
        (4e-3, 10.0, ["weight_decay"]),
        (3e-3, 3.2, []),
        # The rate is what is too large, and is put right.
        (0.6, 0.1, []),
    ],
)
def test_a_weight_decay_that_leaves_nothing_of_the_weights(
    lr: float, decay: float, names: list[str]
) -> None:
    config = replace(CONFIG, optim=OptimConfig(warmup_steps=50, lr=lr, weight_decay=decay))
    assert list(alarms_of(healthy(), config)) == names
    assert [alarm.step for alarm in alarms_of(healthy(), config).values()] == [1] * len(names)


def test_a_loss_that_stands_still_is_a_plateau_and_one_that_falls_slowly_is_none() -> None:
    still, slow = list(healthy(6000)), list(healthy(6000))
    for line in still[499:]:
        line["loss"] += 4.2 * (505**-0.25 - (line["step"] + 5) ** -0.25)
    for line in slow:
        line["loss"] = 3.0 * line["step"] ** -0.05 + (line["loss"] % 0.1)
    assert alarms_of(slow) == {}
    alarms = alarms_of(still)
    assert list(alarms) == ["plateau"]
    assert 1000 < alarms["plateau"].step < 2500


def validated(losses: Iterable[float], grows: float) -> dict[str, Alarm]:
    detectors, lines = Detectors(CONFIG, SIGNS), list(healthy(1000))
    for number, loss in enumerate(losses, start=1):
        for line in lines[100 * (number - 1) : 100 * number]:
            line["loss"] -= grows * max(0, number - 4)
            detectors.append(line)
        detectors.validated(100 * number, loss)
    return detectors.alarms


def test_a_held_out_loss_that_stays_behind() -> None:
    usual = [2.1 + 4.2 * (100 * number) ** -0.25 for number in range(1, 11)]
    assert validated(usual, 0.0) == {}
    # The training loss falls by 0.15 more in each hundred, and the held-out one does not follow.
    alarms = validated(usual, 0.15)
    assert "held_out_gap" in alarms
    assert 500 <= alarms["held_out_gap"].step <= 800


def test_a_rollback_takes_back_what_was_learnt() -> None:
    lines, history, detectors = list(healthy(400)), MetricHistory(), Detectors(CONFIG, SIGNS)
    for line in lines[299:]:
        line |= {"attention_logit": 90.0, "loss": 0.3}
    for line in lines:
        history.append(line)
        detectors.append(line)
    before = {name: alarm.step for name, alarm in detectors.alarms.items()}
    assert before.keys() == {"logit_jump", "falls_too_well"}
    history.begin_attempt(290)
    detectors.rebuild(history)
    assert detectors.alarms == {}
    for line in lines[290:]:
        detectors.append(line)
    assert {name: alarm.step for name, alarm in detectors.alarms.items()} == before


def test_the_update_ratio_of_all_weights_is_told_by_that_of_the_sample() -> None:
    """Against both, of a model that Adam's first update has moved: all weights alike."""
    model = OPT(MODEL)
    initialise(model, MODEL, 3)
    weights = [parameter.detach() for parameter in model.parameters()]
    sampled = UpdateRatio(lambda: weights)
    sampled.measure()
    before = torch.cat([weight.flatten() for weight in weights])
    for weight in weights:
        weight.add_(torch.randn(weight.shape).sign(), alpha=1e-3)
    moved = sampled.measure()
    assert moved is not None
    of_sample = math.sqrt(float(moved.update / moved.weights))
    after = torch.cat([weight.flatten() for weight in weights])
    of_all = float((after - before).norm() / before.norm())
    assert of_all / of_sample == pytest.approx(update_scale.whole_over_sample(CONFIG), rel=0.03)
    assert of_all > 1.3 * of_sample
    assert update_scale.SAMPLE == SAMPLE
