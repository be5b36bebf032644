"""Data that is broken, by the batch itself: whatever the loss does meanwhile, and it may well fall.

The training loop looks at each batch (`data/batch_checks.py`) and the metrics have what it saw: how
much the tokens of a sequence differ, labels that are their inputs, sequences that are there twice.
What is impossible in text is an alarm from the first step on; the rest is compared with the run's
own level, as corpora differ: sources of programs repeat what prose does not.

Measured on 18,000 batches of the standard library's sources (2,048 entries; sequences of 32 to
1,024 tokens, 8 to 32 a batch): the entropy lay between 4.9 deviations below and 3.1 above its
level, 0.85 to 1.10 times as large; of the labels at most 7 % were their inputs, of the sequences
3 % duplicates. Tokens drawn at random have 1.11 times the usual entropy in sequences of 32, which
is not to be told from text, 1.18 in 64, 1.30 in 256 and 1.39 in 1,024.
"""

import math
import statistics
from collections import deque

from opt_train.config.run_config import RunConfig
from opt_train.stability.detectors import Alarm, Numbers, Sign
from opt_train.stability.level import CONSISTENT, ENOUGH, FAR, REFUSED_BEFORE_NEW, WINDOW

TIMES = 2
"""Steps in a row: one odd batch harms nothing, and costs less than to go back."""
EQUAL_SHARE, DUPLICATE_SHARE = 0.5, 0.5
"""Of labels and of sequences: more is no text, whatever is usual."""
TIMES_USUAL = 4.0
ENTROPY_FLOOR = 0.1
"""Nats: a sequence of nothing but one token has 0, of two in turn 0.69."""
SPREAD_MIN, LOW, HIGH = 0.02, 0.6, 1.15
"""Of the entropy: the least deviation of its logarithm, and the ratios that count."""


REPEAT_SHARE, REPEAT_TIMES = 0.5, 4
"""Of the sequences, and in so many steps in a row."""


class RepeatedData(Sign):
    """Says that the data goes in circles: batch after batch has been there before, all at the same
    distance."""

    columns = ("batch_repeats",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._times = 0

    def take(self, step: int, line: Numbers) -> Alarm | None:
        share = line["batch_repeats"]
        self._times = self._times + 1 if share is not None and share >= REPEAT_SHARE else 0
        if self._times < REPEAT_TIMES:
            return None
        what = f"{self._times} batches in a row had been read before, in the same order"
        return Alarm("repeated_data", step, what)


class BrokenData(Sign):
    """Says what is wrong with the batch of a step, once something has been for `TIMES` steps."""

    columns = ("batch_token_entropy", "batch_equal_labels", "batch_duplicates")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._entropies: deque[float] = deque(maxlen=WINDOW)
        self._equal: deque[float] = deque(maxlen=WINDOW)
        self._duplicates: deque[float] = deque(maxlen=WINDOW)
        self._times = self._refused = 0

    def take(self, step: int, line: Numbers) -> Alarm | None:
        entropy, equal, duplicates = (line[name] for name in self.columns)
        if entropy is None or equal is None or duplicates is None:
            return None
        # From the most certain on: of a batch of one token three checks are true, and one is named.
        why = (
            _why_one_token(entropy)
            or _why_labels(equal, self._equal)
            or _why_duplicates(duplicates, self._duplicates)
            or _why_entropy(entropy, self._entropies)
        )
        self._times = self._times + 1 if why else 0
        self._refused = self._refused + 1 if why else 0
        # What is broken would become what is usual, and the good data behind it the alarm.
        if not why or self._refused > REFUSED_BEFORE_NEW:
            self._entropies.append(entropy)
            self._equal.append(equal)
            self._duplicates.append(duplicates)
        return Alarm("broken_data", step, why) if self._times >= TIMES else None


def _why_one_token(entropy: float) -> str:
    if entropy < ENTROPY_FLOOR:
        return f"the tokens of a sequence are nearly all the same ({entropy:.2f} nats)"
    return ""


def _why_labels(share: float, usual: deque[float]) -> str:
    if share > EQUAL_SHARE and share > TIMES_USUAL * _level(usual):
        return f"{share:.0%} of the labels are the inputs at their places"
    return ""


def _why_duplicates(share: float, usual: deque[float]) -> str:
    # A quarter, where there are none as a rule, is no accident of the order either.
    most = DUPLICATE_SHARE / 2 if len(usual) >= ENOUGH else DUPLICATE_SHARE
    if share >= most and share > TIMES_USUAL * _level(usual):
        return f"{share:.0%} of the sequences are the same as others of their batch"
    return ""


def _why_entropy(entropy: float, usual: deque[float]) -> str:
    # Of how much text differs nothing is known before there is some of it.
    if len(usual) < ENOUGH:
        return ""
    logs = [math.log(value) for value in usual]
    median = statistics.median(logs)
    spread = CONSISTENT * statistics.median(abs(log - median) for log in logs)
    above = math.log(entropy) - median
    ratio = math.exp(above)
    if abs(above) / max(spread, SPREAD_MIN) > FAR and not LOW < ratio < HIGH:
        return (
            f"the token entropy of a sequence is {entropy:.2f} nats; usual are "
            f"{math.exp(median):.2f}"
        )
    return ""


def _level(usual: deque[float]) -> float:
    return statistics.median(usual) if len(usual) >= ENOUGH else 0.0
