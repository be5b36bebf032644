"""What in the metrics says that training goes wrong: one alarm a sign.

Thresholds were found on tiny models and on published loss curves: 64,200 healthy steps raised none
of these alarms, nor did 134,609 points of real curves that of the rising loss. On the real trainer
92,000 healthy steps of tiny models raised none (docs/benchmarks.md).

A detector keeps a window of what was accepted, and leaves out what it refused: else a history that
has an outlier in it is blind for the next. The rising loss is measured by the best level so far,
which outlives the window: whoever compares with the last steps alone learns what is wrong.
After a rollback all windows are those of the step that was gone back to.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from opt_train.config.run_config import RunConfig
from opt_train.stability import gradient_scales
from opt_train.stability.gradient_scales import EmbeddingSigns, LossScaleSigns
from opt_train.stability.level import CONSISTENT, FAR, FIRST_STEP, Level
from opt_train.stability.metric_history import HISTORY_STEPS, MetricHistory, number_of

JUMP, FROZEN = 4.0, 1 / 8
"""Times the median."""
NON_FINITE = 3
"""Steps in a row."""
RISE_FIRST_STEP = 40
RISE_SHORT, RISE_LONG, RISE_TIMES = 8, 32, 4
"""Medians of so many losses, and how often in a row.

The best of medians of 16, with the noise of 64 differences, stood 6.6 errors below a cluster of
hard batches in a healthy run of 128 tokens a batch; of 32, with 128, it stands 3.6. In another, of
104 that were measured, five hard batches at step 100 stood 8.6 errors above it, as half of the 128
differences were those of the quiet first steps; with the noise of the last 48 as well, 3.4."""
RISE_ERRORS, RISE_SHARE = 6.0, 0.04
_DIFFERENCES, _DIFFERENCES_NOW = 128, 48
_COLUMNS = ("loss", "grad_norm", "update_ratio", "lr", "skipped", "overflow")
COLUMNS = (*_COLUMNS, *gradient_scales.COLUMNS)
"""That are asked for."""


Numbers = Mapping[str, float | None]
"""Of a metrics line, by column; None: it has none there."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One sign at one step."""

    name: str
    """A key of `ladder.LADDER`."""
    step: int
    what: str
    ratio: float = 1.0
    """How many times its usual size the measured value is, where it is measured so."""
    samples: int = 0
    """Of the order of the data consumed up to there."""
    scale: float = 0.0
    """The loss scale that steps were taken with before, where it is one of those; 0: none is
    known."""


class Rise:
    """Whether the loss stands above the best level that it has had."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_DIFFERENCES + 1)
        self._best = math.inf
        self._times = 0

    def add(self, loss: float) -> bool:
        """Take the loss of a step in; True if it has risen."""
        self._losses.append(loss)
        losses = list(self._losses)
        if len(losses) < RISE_LONG:
            return False
        now = statistics.median(losses[-RISE_SHORT:])
        # Of differences, not of levels: a loss that falls would widen those.
        steps = [abs(after - before) for before, after in pairwise(losses)]
        # Of the last ones too: text that is learnt better is noisier, and 128 are long in the
        # beginning.
        step = max(statistics.median(steps), statistics.median(steps[-_DIFFERENCES_NOW:]))
        noise = CONSISTENT * step / math.sqrt(2)
        error = 1.25 * noise / math.sqrt(RISE_SHORT)
        above = now - self._best > max(RISE_ERRORS * error, RISE_SHARE * self._best)
        self._times = self._times + 1 if above else 0
        # Of the longer median: one lucky batch must not set a level that nothing reaches again.
        self._best = min(self._best, statistics.median(losses[-RISE_LONG:]))
        return self._times >= RISE_TIMES

    @property
    def best(self) -> float:
        return self._best


class Sign:
    """A detector with windows of its own; by itself it sees nothing. signs.py has some."""

    columns: tuple[str, ...] = ()
    """That it asks for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def take(self, step: int, line: Numbers) -> Alarm | None:
        """Take a step in that was accepted, its `columns`; an alarm if it is one."""
        return None

    def validated(self, step: int, loss: float) -> Alarm | None:
        """Take in what the held-out data costs at `step`."""
        return None


class Detectors:
    """All of them. `alarms`: the first of each name since the attempt began."""

    def __init__(
        self, config: RunConfig, signs: Sequence[Callable[[RunConfig], Sign]] = ()
    ) -> None:
        """
        Args:
            signs: make detectors beside those that are here.
        """
        self._config, self._makers = config, signs
        # So many the training loop leaves out, and takes the next whatever it is.
        self._outliers_max = config.optim.skip_in_row
        self._overflows = config.precision.compute == "fp16"
        self._begin()

    def _begin(self) -> None:
        self.alarms: dict[str, Alarm] = {}
        self._signs = [make(self._config) for make in self._makers]
        asked = {name for sign in self._signs for name in sign.columns}
        self._columns = tuple({*COLUMNS, *asked})
        self._updates, self._updates_by_rate = Level(), Level()
        self._rate_before = 0.0
        self._rise = Rise()
        self._outliers = self._non_finite = self._samples = 0
        # Each takes every line in, and gives the signs it sees.
        self._others = (LossScaleSigns(self._config), EmbeddingSigns(self._config))

    def rebuild(self, history: MetricHistory) -> None:
        """Begin anew with what `history` has; nothing of it alarms again."""
        self._begin()
        columns = [history.values(name, HISTORY_STEPS) for name in self._columns]
        for step, *values in zip(history.steps(HISTORY_STEPS), *columns, strict=True):
            self.append({"step": step, **dict(zip(self._columns, values, strict=True))})
        self.alarms = {}

    def append(self, line: Mapping[str, Any]) -> None:
        """Take a metrics line in."""
        step = int(line["step"])
        loss, norm, ratio, rate, skipped, overflow = (number_of(line.get(n)) for n in _COLUMNS)
        self._samples = int(line.get("samples") or 0)
        rate_before, self._rate_before = self._rate_before, rate or 0.0
        # Before the outliers, which an embedding's gradient may be behind.
        for others in self._others:
            for seen in others.append(line):
                self._raise(seen.name, step, seen.what, seen.ratio, seen.scale)
        # The update that a line tells is the one before its step, which was made whatever became of
        # this one: too large a rate is seen by it, and not by the outliers that it brings about.
        if ratio is not None:
            self._watch_updates(step, ratio, ratio / rate_before if rate_before > 0 else ratio)
        finite = all(value is None or math.isfinite(value) for value in (loss, norm))
        # A loss scale that is too high overflows as a matter of course; without one nothing may.
        expected = self._overflows and overflow == 1.0
        self._non_finite = 0 if finite or expected else self._non_finite + 1
        self._outliers = self._outliers + 1 if skipped == 1.0 and finite else 0
        if self._non_finite >= NON_FINITE:
            self._raise("non_finite", step, f"{NON_FINITE} steps in a row were not finite")
        if self._outliers >= self._outliers_max > 0:
            what = f"{self._outliers} steps in a row were outliers and left out"
            self._raise("outliers", step, what)
        # Nothing was learnt from it, so nothing is learnt of it.
        if skipped == 1.0 or not finite:
            return
        numbers = {name: number_of(line.get(name)) for name in self._columns}
        for sign in self._signs:
            self._note(sign.take(step, numbers))
        if loss is not None and self._rise.add(loss) and step > RISE_FIRST_STEP:
            self._raise(
                "rise", step, f"the loss has risen from {self._rise.best:.3f} to {loss:.3f}"
            )

    def validated(self, step: int, loss: float) -> None:
        """Take in what the held-out data costs at `step`."""
        for sign in self._signs:
            self._note(sign.validated(step, loss))

    def _note(self, alarm: Alarm | None) -> None:
        if alarm is not None:
            self.alarms.setdefault(alarm.name, replace(alarm, samples=self._samples))

    def _watch_updates(self, step: int, ratio: float, by_rate: float) -> None:
        """`by_rate`: by the learning rate that the update was made with."""
        deviations, times = self._updates.take(ratio)
        its_deviations, its_times = self._updates_by_rate.take(by_rate)
        if step < FIRST_STEP:
            return
        # Who changes the rate changes the updates, and that is no instability; and a rate that puts
        # one right changes neither: both must be far off.
        if min(deviations, its_deviations) > FAR and min(times, its_times) > JUMP:
            what = f"an update was {times:.1f} times as large as usual"
            self._raise("update_jump", step, what, times)
        if max(deviations, its_deviations) < -FAR and max(times, its_times) < FROZEN:
            what = f"an update was {1 / times:.0f} times smaller than usual"
            self._raise("frozen", step, what, times)

    def forget(self, step: float) -> None:
        """Alarms up to `step` have been answered, and training has gone on: the next of a name
        counts again."""
        rest = {name: alarm for name, alarm in self.alarms.items() if alarm.step > step}
        if len(rest) < len(self.alarms):
            for others in self._others:
                others.begin_again()
        self.alarms = rest

    def _raise(
        self, name: str, step: int, what: str, ratio: float = 1.0, scale: float = 0.0
    ) -> None:
        # The first counts: later ones of its name tell how long it has gone on, and no more.
        self.alarms.setdefault(name, Alarm(name, step, what, ratio, self._samples, scale))
