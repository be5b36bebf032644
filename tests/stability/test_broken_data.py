"""Broken data is named by what is wrong with it, and what is usual in a corpus raises nothing."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.stability.broken_data import REFUSED_BEFORE_NEW, REPEAT_TIMES, TIMES
from opt_train.stability.detectors import Alarm, Detectors
from opt_train.stability.ladder import Rung, answer
from opt_train.stability.metric_history import MetricHistory
from opt_train.stability.signs import SIGNS


def batches(steps: int = 300, seed: int = 1, **changes: float) -> Iterator[dict[str, Any]]:
    """What the checks see in text: the entropy of a few sequences is noisy."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        seen = {
            "batch_token_entropy": 3.4 * (1 + draw.gauss(0, 0.02)),
            "batch_equal_labels": max(0.0, draw.gauss(0.04, 0.01)),
            "batch_duplicates": 0.125 if draw.random() < 0.01 else 0.0,
            "batch_repeats": 0.125 if draw.random() < 0.01 else 0.0,
        }
        yield {"step": step, "loss": 3.0, "grad_norm": 1.0, "skipped": False, **seen, **changes}


def alarm_of(lines: Any, name: str = "broken_data") -> tuple[int, str] | None:
    detectors = Detectors(RunConfig(), SIGNS)
    for line in lines:
        detectors.append(line)
    alarm = detectors.alarms.get(name)
    return None if alarm is None else (alarm.step, alarm.what)


@pytest.mark.parametrize("seed", range(20))
def test_text_raises_none(seed: int) -> None:
    assert alarm_of(batches(2000, seed)) is None
    assert alarm_of(batches(2000, seed), "repeated_data") is None


def test_data_that_goes_in_circles_is_named_and_is_trained_again_once() -> None:
    found = alarm_of(batches(8, batch_repeats=1.0), "repeated_data")
    assert found == (REPEAT_TIMES, "4 batches in a row had been read before, in the same order")
    alarm = Alarm("repeated_data", 4, "")
    assert [answer(alarm, acts, 4).rung for acts in (0, 1)] == [Rung.REPLAY, Rung.HAND_OVER]
    # Fewer in a row are text that comes again.
    assert alarm_of(batches(3, batch_repeats=1.0), "repeated_data") is None


@pytest.mark.parametrize(
    ("sick", "words"),
    [
        ({"batch_equal_labels": 1.0}, "100% of the labels are the inputs at their places"),
        ({"batch_token_entropy": 0.0}, "the tokens of a sequence are nearly all the same"),
        # All three at once, as one token over and over has them: the narrowest is named.
        (
            dict.fromkeys(("batch_equal_labels", "batch_duplicates"), 1.0)
            | {"batch_token_entropy": 0.0},
            "the tokens of a sequence are nearly all the same",
        ),
        ({"batch_duplicates": 0.875}, "88% of the sequences are the same as others"),
    ],
)
def test_what_is_no_text_is_named_from_the_first_step_on(
    sick: dict[str, float], words: str
) -> None:
    found = alarm_of(batches(5, **sick))
    assert found is not None
    assert found[0] == TIMES
    assert words in found[1]


@pytest.mark.parametrize(
    ("sick", "words"),
    [
        ({"batch_token_entropy": 4.1}, "is 4.10 nats; usual are 3."),
        ({"batch_token_entropy": 1.9}, "is 1.90 nats; usual are 3."),
        ({"batch_duplicates": 0.25}, "25% of the sequences are the same as others"),
    ],
)
def test_what_is_unusual_in_the_run_is_named(sick: dict[str, float], words: str) -> None:
    lines = list(batches(200))
    for line in lines[150:]:
        line.update(sick)
    found = alarm_of(lines)
    assert found is not None
    assert found[0] == 150 + TIMES
    assert words in found[1]
    # One such batch alone is none.
    for line in lines[151:]:
        line.update(lines[100] | {"step": line["step"]})
    assert alarm_of(lines) is None


def test_a_level_that_lasts_is_the_corpuss_and_the_good_data_behind_a_bad_range_is_good() -> None:
    lines = list(batches(400))
    for line in lines[150:180]:
        line["batch_token_entropy"] = 1.5
    detectors, raised = Detectors(RunConfig(), SIGNS), []
    for line in lines:
        detectors.alarms = {}
        detectors.append(line)
        raised += [line["step"]] if detectors.alarms else []
    assert raised == list(range(150 + TIMES, 181))
    other = [*batches(200), *({**b, "step": 200 + b["step"]} for b in batches(300, 2))]
    for line in other[200:]:
        line["batch_token_entropy"] *= 0.5
    detectors, raised = Detectors(RunConfig(), SIGNS), []
    for line in other:
        detectors.alarms = {}
        detectors.append(line)
        raised += [line["step"]] if "broken_data" in detectors.alarms else []
    assert 200 + TIMES in raised
    assert raised[-1] <= 200 + REFUSED_BEFORE_NEW + 128


def test_it_is_probed_then_passed_over_and_lines_without_the_columns_say_nothing() -> None:
    lines = [{k: v for k, v in b.items() if not k.startswith("batch")} for b in batches(100)]
    assert alarm_of(lines) is None
    detectors = Detectors(RunConfig(), SIGNS)
    for line in batches(5, batch_equal_labels=1.0):
        detectors.append(line)
    alarm = detectors.alarms["broken_data"]
    assert answer(alarm, 0, 4).rung is Rung.REPLAY
    # A probe sees by the loss alone, which a document that repeats leaves as it is.
    again = [answer(alarm, acts, 4) for acts in (1, 2)]
    assert [a.rung for a in again] == [Rung.SKIP, Rung.SKIP]
    assert [a.beyond_batches for a in again] == [64, 256]
    # A supervisor that takes over knows the level, and raises nothing of the past again.
    history = MetricHistory()
    for line in batches(200):
        history.append(line)
    detectors.rebuild(history)
    assert detectors.alarms == {}
    for line in batches(2, batch_token_entropy=1.9):
        detectors.append({**line, "step": 200 + line["step"]})
    assert "broken_data" in detectors.alarms
