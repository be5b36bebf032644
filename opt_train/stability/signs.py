"""Signs beside those of detectors.py: ceilings, jumps of activations and logits, a loss that falls
too well, a first loss that is too large, a plateau, a held-out loss that stays behind.

Thresholds of ceilings, jumps and of the falling loss were found on 64,200 healthy steps of tiny
models in plain PyTorch, where none alarmed below twice the best learning rate, that of the falling
loss on 134,609 points of published curves too. Those of the plateau and of the gap were not
measured, which is why both only advise (`modes.ADVISE_ONLY`).

Units: `activation_norm` is a token's whole L2 norm, so a ceiling of 12 for each of the d_model
activations is 12 sqrt(d_model). The logit is that of the sample which is taken on every step.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable

from opt_train.config.run_config import RunConfig
from opt_train.stability.broken_data import BrokenData, RepeatedData
from opt_train.stability.detectors import JUMP, Alarm, Numbers, Sign
from opt_train.stability.level import CONSISTENT, FAR, FIRST_STEP, Level
from opt_train.stability.update_scale import whole_over_sample

ACTIVATION_CEILING = 12.0
"""Root mean square of an activation, in the first steps."""
LOGIT_CEILING_EARLY, LOGIT_CEILING = 50.0, 100.0
"""Below `FIRST_STEP`, and from it on."""
UPDATE_RATIO_WELL = 0.012
"""Of all weights, at a rate that trained well where the ceilings were found."""
UPDATES_LOOKED_AT = 8
RATIO_UNKNOWN = 10.0
"""How many times too large the updates are taken to be where they are not told."""
TOO_WELL = 0.8
TOO_WELL_NEW, TOO_WELL_OLD, TOO_WELL_BETWEEN = 8, 48, 40
"""Steps: the median of the newest is compared with that of older ones, with others between."""
TOO_WELL_ENOUGH = 160
FIRST_LOSS = 1.5
"""Times the logarithm of the vocabulary, which is what a guess costs."""
DECAY_LARGE, DECAY_A_STEP = 1.0, 0.02
"""The factor itself, and the share of a weight that is lost at a step: in 50 steps a weight is what
they made it, and nothing before counts. OPT-175B had a rate of 1.2e-4 and a decay of 0.1, which
takes 1.2e-5."""
PLATEAU_WINDOW, PLATEAU_ENOUGH = 128, 400
PLATEAU_SPACING, PLATEAU_TIMES = 1.1, 3
PLATEAU_FALL = 0.005
"""A loss that falls by less over a doubling of the steps stands still."""
GAP_STEPS = 64
GAP_SHARE, GAP_ERRORS = 0.08, 4.5


class Ceilings(Sign):
    """Activations and logits that no run has which goes well, whatever they were before."""

    columns = ("activation_norm", "attention_logit", "update_ratio")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._activations_most = ACTIVATION_CEILING * math.sqrt(config.model.d_model)
        self._warm_up = max(FIRST_STEP, config.optim.warmup_steps)
        self._peak_step = config.optim.warmup_steps
        # What was trained before has the activations of such a model from its first step on.
        self._is_fresh = not config.train.initial_weights
        self._scale = whole_over_sample(config)
        self._updates: deque[float] = deque(maxlen=UPDATES_LOOKED_AT)
        self._logits: deque[float] = deque(maxlen=FIRST_STEP)

    def take(self, step: int, line: Numbers) -> Alarm | None:
        activations, logit, update = (line[name] for name in self.columns)
        if update is not None and math.isfinite(update):
            # What it would be at the schedule's peak, which the warm-up has not come to: the rate
            # is to be right there.
            self._updates.append(update * max(1.0, self._peak_step / max(1, step)))
        what = self._above(step, activations, logit)
        if logit is not None and not math.isnan(logit):
            self._logits.append(logit)
        if not what:
            return None
        name = "ceiling_at_start" if self._is_fresh and step <= self._warm_up else "ceiling"
        return Alarm(name, step, what, self._times_too_large())

    def _above(self, step: int, activations: float | None, logit: float | None) -> str:
        early = step < FIRST_STEP
        if early and not self._is_fresh:
            return ""
        most = LOGIT_CEILING_EARLY if early else LOGIT_CEILING
        # Only who comes from below is news: a large model that was trained for months may be used
        # to it, and is not to be stopped for it at every restart.
        usual = statistics.median(self._logits) if self._logits else 0.0
        if logit is not None and logit > most >= usual:
            return f"the largest attention logit is {logit:.1f}, above {most:g}"
        if early and activations is not None and activations > self._activations_most:
            return (
                f"the activation norm is {activations:.1f}, above {self._activations_most:.1f}, "
                f"{ACTIVATION_CEILING:g} for each activation"
            )
        return ""

    def _times_too_large(self) -> float:
        """The newest updates, relative to those of a run that goes well."""
        if not self._updates:
            return RATIO_UNKNOWN
        return self._scale * statistics.median(self._updates) / UPDATE_RATIO_WELL


class Jump(Sign):
    """A positive column that is suddenly several times as large as usual."""

    def __init__(self, config: RunConfig, column: str, name: str, words: str) -> None:
        super().__init__(config)
        self.columns = (column,)
        self._name, self._words = name, words
        self._first_step = max(FIRST_STEP, config.optim.warmup_steps)
        self._level = Level()

    def take(self, step: int, line: Numbers) -> Alarm | None:
        value = line[self.columns[0]]
        # In the warm-up both grow many times over, as they should: what is usual then is little
        # behind it.
        if value is None or step < self._first_step:
            return None
        deviations, times = self._level.take(value)
        if deviations <= FAR or times <= JUMP:
            return None
        return Alarm(
            self._name, step, f"{self._words} is {times:.1f} times as large as usual", times
        )


def activation_jump(config: RunConfig) -> Sign:
    return Jump(config, "activation_norm", "activation_jump", "the activation norm")


def logit_jump(config: RunConfig) -> Sign:
    return Jump(config, "attention_logit", "logit_jump", "the largest attention logit")


class FallsTooWell(Sign):
    """A loss that falls faster than anything is learnt: the data has become too easy."""

    columns = ("loss",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        # In the warm-up it falls as fast, and that is how it should be.
        self._first_step = max(TOO_WELL_ENOUGH, config.optim.warmup_steps)
        self._losses: deque[float] = deque(maxlen=TOO_WELL_NEW + TOO_WELL_BETWEEN + TOO_WELL_OLD)

    def take(self, step: int, line: Numbers) -> Alarm | None:
        loss = line["loss"]
        if loss is None:
            return None
        self._losses.append(loss)
        losses = list(self._losses)
        if step <= self._first_step or len(losses) < (self._losses.maxlen or 0):
            return None
        now = statistics.median(losses[-TOO_WELL_NEW:])
        before = statistics.median(losses[:TOO_WELL_OLD])
        if not 0 < now < TOO_WELL * before:
            return None
        what = f"the loss has fallen from {before:.3f} to {now:.3f}, too well to be learnt"
        return Alarm("falls_too_well", step, what, now / before)


class FirstLoss(Sign):
    """A model that begins much worse than a guess was not initialised as it should be."""

    columns = ("loss",)

    def take(self, step: int, line: Numbers) -> Alarm | None:
        loss, guess = line["loss"], math.log(self.config.model.vocab_size)
        if step != 1 or loss is None or loss <= FIRST_LOSS * guess:
            return None
        what = (
            f"the first loss is {loss:.2f}, and a guess costs {guess:.2f}: the initialisation is "
            "not what it should be"
        )
        return Alarm("initialisation", step, what, loss / guess)


class WeightDecay(Sign):
    """A weight decay that takes more of the weights at every step than they can learn."""

    columns = ("loss",)

    def take(self, step: int, line: Numbers) -> Alarm | None:
        # Of the configuration alone, so it is told before anything is spent. Where the rate is what
        # is too large, there are other signs, with other answers.
        decay = self.config.optim.weight_decay
        taken = self.config.optim.lr * decay
        if step != 1 or decay < DECAY_LARGE or taken <= DECAY_A_STEP:
            return None
        what = (
            f"a weight decay of {decay:g} takes {min(taken, 1.0):.0%} of each weight at every step "
            "of the full learning rate"
        )
        return Alarm("weight_decay", step, what, taken / DECAY_A_STEP)


class Plateau(Sign):
    """A loss that does not fall any more while the steps have doubled."""

    # By doublings: a power law falls as much in each, and ever less in a thousand steps.
    columns = ("loss",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._losses: deque[float] = deque(maxlen=PLATEAU_WINDOW)
        self._marks: list[tuple[int, float]] = []
        """Steps, ever further apart, and the median of the losses up to there."""
        self._times = 0

    def take(self, step: int, line: Numbers) -> Alarm | None:
        if line["loss"] is None:
            return None
        self._losses.append(line["loss"])
        last = self._marks[-1][0] if self._marks else 0
        if len(self._losses) < PLATEAU_WINDOW or step < PLATEAU_SPACING * last:
            return None
        now = statistics.median(self._losses)
        self._marks.append((step, now))
        old = [median for mark, median in self._marks if 2 * mark <= step]
        if step < PLATEAU_ENOUGH or not old or not old[-1] > 0:
            return None
        self._times = self._times + 1 if now > (1 - PLATEAU_FALL) * old[-1] else 0
        if self._times < PLATEAU_TIMES:
            return None
        what = f"the loss stands still: {old[-1]:.3f} at half the steps, {now:.3f} now"
        return Alarm("plateau", step, what)


class HeldOutGap(Sign):
    """The held-out loss does not follow the training loss any more: the same data comes again and
    again, or other data than is held out."""

    columns = ("loss",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._losses: deque[float] = deque(maxlen=GAP_STEPS)
        self._least = math.inf

    def take(self, step: int, line: Numbers) -> Alarm | None:
        if line["loss"] is not None:
            self._losses.append(line["loss"])
        return None

    def validated(self, step: int, loss: float) -> Alarm | None:
        if len(self._losses) < GAP_STEPS or step < FIRST_STEP:
            return None
        train = statistics.median(self._losses)
        spread = CONSISTENT * statistics.median(abs(one - train) for one in self._losses)
        error = 1.25 * spread / math.sqrt(GAP_STEPS)
        gap, least = loss - train, self._least
        self._least = min(least, gap)
        if not gap - least > max(GAP_SHARE * train, GAP_ERRORS * error):
            return None
        what = (
            f"the held-out loss is {loss:.3f} and that of training {train:.3f}: the gap has grown "
            f"by {gap - least:.3f}"
        )
        return Alarm("held_out_gap", step, what)


SIGNS: tuple[Callable[[RunConfig], Sign], ...] = (
    # From the most certain on: of several at one step the first is answered.
    FirstLoss,
    WeightDecay,
    BrokenData,
    RepeatedData,
    Ceilings,
    activation_jump,
    logit_jump,
    FallsTooWell,
    Plateau,
    HeldOutGap,
)
"""One each: what is looked for beside the signs of detectors.py."""
