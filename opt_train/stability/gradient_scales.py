"""Signs of a loss scale that is of no use, and of an embedding whose gradient drowns the rest.

A dynamic loss scale is *meant* to overflow: each time it has doubled beyond what fits, and at the
beginning, from a first scale that is too high down to one that fits, on as many steps in a row as
it has halvings to go. So an overflow counts only at a scale that has been seen to work, and how
many are too many follows from the configured window.

What has become of the forward pass is asked first: where the loss is not finite, no scale helps.
Thresholds were found on tiny models in plain PyTorch, with fp16 emulated by rounding.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import parameter_count
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.stability.level import FAR, FIRST_STEP, WINDOW, Level
from opt_train.stability.metric_history import number_of

COLUMNS = ("loss_scale", "loss_scale_floor", "embedding_grad_ratio")
"""That are asked for, beside those of all."""
OVERFLOWS = 8
"""In a row, from a scale that has worked: 2^8 below it gradients begin to vanish."""
AT_FLOOR = 3
"""Overflows in a row at the floor: there is nowhere to go."""
RECENT = 32
MOST = 0.5
"""Of the recent steps, left out: training waits for its scale more than it trains."""
ZEROS = 4
"""Gradients in a row that are exactly zero."""
LEAST = 2.0**-24
"""The smallest number above 0 that fp16 has."""
VANISHING = 8
"""Gradients in a row whose elements, with the scale, are in the mean square below twice that: what
is below half of it has become zero."""
NOT_FINITE = 3
"""Losses in a row."""
DROWNS = 16.0
"""Times the usual. No healthy step of tiny models reached twice the usual norm."""
DROWNING = 3
"""Steps in a row: before the last that the training loop leaves out as outliers."""
LR_DIVISOR = 1 / 0.3
"""Where the rate is to be lowered and nothing says by how much."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What an alarm is made of."""

    name: str
    what: str
    ratio: float = 1.0
    scale: float = 0.0


class LossScaleSigns:
    """Watches the loss scale, where there is one."""

    def __init__(self, config: RunConfig) -> None:
        policy = policy_of(config.precision)
        # As a matter of course: so many overflows for each window of steps that went well.
        window = max(1, policy.window_steps)
        expected = RECENT * policy.hysteresis / (window + policy.hysteresis)
        self._overflows_max = min(RECENT, max(MOST * RECENT, 2 * expected))
        self._is_fp16 = config.precision.compute == "fp16"
        self._elements = parameter_count(config.model)
        self._worked: deque[float] = deque(maxlen=WINDOW)
        """Scales of steps that were taken, with gradients that were not zero."""
        self._scale = 0.0
        self.begin_again()

    def begin_again(self) -> None:
        """What was counted has been answered; what was learnt stays."""
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._in_row = self._at_floor = self._zeros = self._vanishing = self._not_finite = 0

    @property
    def usual(self) -> float:
        """The scale that steps were taken with before; 0: none was."""
        return statistics.median_low(self._worked) if self._worked else 0.0

    def append(self, line: Mapping[str, Any]) -> Iterator[Seen]:
        """Take a metrics line in; gives what it is a sign of."""
        scale, floor = number_of(line.get("loss_scale")), number_of(line.get("loss_scale_floor"))
        if scale is None or floor is None:
            return
        before, self._scale = self._scale, scale
        if before and scale not in (before / 2, before, before * 2):
            # By itself it moves by a factor of two: it has been set, and what was counted answered.
            self.begin_again()
        loss, norm = number_of(line.get("loss")), number_of(line.get("grad_norm"))
        if loss is not None and not math.isfinite(loss):
            self._not_finite += 1
            if self._not_finite >= NOT_FINITE:
                what = f"the loss was not finite on {self._not_finite} steps in a row"
                yield Seen("forward_overflow", what, LR_DIVISOR)
            return
        self._not_finite = 0
        if number_of(line.get("overflow")) == 1.0:
            yield from self._overflowed(scale, floor)
            return
        self._in_row = self._at_floor = 0
        self._recent.append(False)
        self._zeros = self._zeros + 1 if norm == 0.0 else 0
        element = (norm or 0.0) * scale / math.sqrt(self._elements)
        vanishes = self._is_fp16 and 0.0 < element < 2 * LEAST
        self._vanishing = self._vanishing + 1 if vanishes else 0
        if self._zeros >= ZEROS:
            what = f"{self._zeros} gradients in a row were zero at a loss scale of {scale:g}"
            yield Seen("underflow", what, scale=self.usual)
        elif self._vanishing >= VANISHING:
            what = (
                f"at a loss scale of {scale:g} an element of the gradient is {element:.1g}, and "
                f"fp16 has nothing below {LEAST:.1g}"
            )
            yield Seen("partial_underflow", what, scale=self.usual)
        elif norm and not self._vanishing and number_of(line.get("skipped")) != 1.0:
            self._worked.append(scale)

    def _overflowed(self, scale: float, floor: float) -> Iterator[Seen]:
        self._zeros = 0
        usual = self.usual
        self._at_floor = self._at_floor + 1 if scale <= floor else 0
        if self._at_floor >= AT_FLOOR:
            times = f"{self._at_floor} steps in a row overflowed"
            what = f"{times} with the loss scale at its floor of {floor:g}"
            yield Seen("loss_scale_floor", what, LR_DIVISOR, usual)
        # Above what has worked the scale searches for its place. The newest one tells: a scale that
        # grows is soon far above the usual.
        if not self._worked or scale > 2 * max(usual, self._worked[-1]):
            return
        self._in_row += 1
        self._recent.append(True)
        if self._in_row >= OVERFLOWS:
            what = (
                f"{self._in_row} steps in a row overflowed, and the loss scale fell from "
                f"{usual:g} to {scale:g}"
            )
            yield Seen("loss_scale_collapse", what, LR_DIVISOR, usual)
        elif sum(self._recent) >= self._overflows_max:
            what = f"{sum(self._recent)} of {len(self._recent)} steps overflowed"
            yield Seen("loss_scale_skips", what, LR_DIVISOR, usual)


class EmbeddingSigns:
    """Watches the embedding's gradient, relative to the rest of it. Such a gradient never shows in
    the loss: clipping shrinks all of it, and what is not the embedding learns nothing."""

    def __init__(self, config: RunConfig) -> None:
        self._level = Level()
        self.begin_again()
        # Outliers are another alarm, which must not come first.
        self._in_row = max(1, min(DROWNING, config.optim.skip_in_row or DROWNING))

    def begin_again(self) -> None:
        """What was counted has been answered; what was learnt stays."""
        self._times: list[float] = []
        """How far off it was, of the newest steps in a row that were."""

    def append(self, line: Mapping[str, Any]) -> Iterator[Seen]:
        """Take a metrics line in; gives what it is a sign of."""
        ratio = number_of(line.get("embedding_grad_ratio"))
        # A step that overflowed has none.
        if ratio is None or not math.isfinite(ratio):
            return
        is_left_out = number_of(line.get("skipped")) == 1.0
        deviations, times = self._level.distance(ratio) if is_left_out else self._level.take(ratio)
        is_far = deviations > FAR and times > DROWNS and int(line["step"]) >= FIRST_STEP
        self._times = [*self._times, times][-WINDOW:] if is_far else []
        if len(self._times) >= self._in_row:
            usual = statistics.median(self._times)
            what = f"the embedding's gradient was {usual:.0f} times its usual part of the whole"
            yield Seen("embedding_gradient", what, usual)
