"""Rules about a learning rate that was lowered: given back step by step, or known to be needed.

A rate that stays low without need costs as much as many an instability (2.6 % of the loss,
measured, where it stayed for two thirds of a short run). And one that is needed must not be raised
to find that out: the windows of the detectors would get used to each doubling. So what is looked at
is how large updates are *by the rate that they were made with*. If they are as before the trouble,
the cause is gone, whatever it was; if they are still too large, the lower rate is what cures.

Each raise is on record as what is done about an instability, and judged like it. An alarm meanwhile
takes it back, and then it stays.
"""

import math
import statistics
from itertools import pairwise

from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from opt_train.protocol.orders import ScaleLr
from opt_train.run.instability import KEPT, LR_CUT, LrCut
from opt_train.stability.ladder import Answer, Rung
from opt_train.stability.metric_history import HISTORY_STEPS
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.leash import withhold
from opt_train.supervisor.rules.orders import order_given
from opt_train.supervisor.stability_modes import mode_of

RAISE_MOST = 2.0
STILL_TOO_LARGE = 2.0
"""Times as large as before, by the rate: the cause is still there."""
COMPARED = 32
"""Steps whose median is taken, before and now."""


def give_back(s: Context) -> list[Decision]:
    """A learning rate that was lowered has held without an alarm: raised, if it is not needed."""
    cut, step = s.state.lr_cut, s.view.training.history.step
    if (raised := _raised(s)) is not None:
        return raised
    if cut is None or not cut.may_be_given_back or not s.state.takes_orders:
        return []
    if s.state.instability is not None or s.state.rollback is not None or may_be_acted_on(s):
        return []
    # After the first time it was judged meanwhile.
    horizon = s.config.stability.horizon_steps
    if not s.attempt.began or step < cut.step + (horizon if cut.given > 1 else 2 * horizon):
        return []
    times = _times_as_before(s, cut)
    if times is None:
        return []
    if times > STILL_TOO_LARGE:
        what = (
            f"the learning rate stays at {cut.factor:.2g} of its schedule: by the rate, updates "
            f"are still {times:.1f} times as large as before"
        )
        return [Record(InstabilityClosed(s.state.instabilities, KEPT, what), step=step)]
    factor = min(RAISE_MOST, 1 / cut.factor)
    what = f"the learning rate has been at {cut.factor:.2g} of its schedule without an alarm"
    words = f"it is given back in part, times {factor:.2g}"
    mode = mode_of(s.config, LR_CUT, Rung.GIVE_BACK)
    if mode is not Mode.ACT:
        return withhold(s, f"stability/{LR_CUT}", (), f"{what}: {words}", mode)
    seen = InstabilitySeen(
        s.state.instabilities + 1,
        LR_CUT,
        what,
        Rung.GIVE_BACK,
        words,
        f"no alarm before step {step + horizon:,}",
        s.view.training.history.newest_finite("loss"),
        order=s.state.orders_given + 1,
        lr_factor=factor,
    )
    order = ScaleLr(seen.order, what, factor)
    return [Record(seen, step=step), Record(order_given(order))]


def _raised(s: Context) -> list[Decision] | None:
    """The order of a raise that is on record without it, as whoever led died in between; None: no
    such raise is."""
    unstable, cut = s.state.instability, s.state.lr_cut
    if unstable is None or unstable.answered or unstable.alarm != LR_CUT or cut is None:
        return None
    if unstable.order != s.state.orders_given + 1 or not s.state.takes_orders:
        return None
    return [Record(order_given(ScaleLr(unstable.order, "the learning rate is raised", cut.given)))]


def taken_again(s: Context) -> Answer | None:
    """What is done about an alarm while a raise of the learning rate is being judged; None: none
    is."""
    unstable, cut = s.state.instability, s.state.lr_cut
    if unstable is not None and unstable.rung == Rung.TAKE_AGAIN and not unstable.answered:
        # On record without its order, as whoever led died in between.
        return Answer(Rung.TAKE_AGAIN, lr_factor=unstable.lr_factor)
    if unstable is None or unstable.alarm != LR_CUT or cut is None:
        return None
    return Answer(Rung.TAKE_AGAIN, lr_factor=1 / cut.given)


def may_be_acted_on(s: Context) -> bool:
    """Whether there is an alarm that is not only spoken of."""
    alarms = s.view.training.detectors.alarms
    return any(mode_of(s.config, name) is Mode.ACT for name in alarms)


def _times_as_before(s: Context, cut: LrCut) -> float | None:
    """Updates by the rate that they were made with, relative to those before the trouble; None: it
    is not known."""
    history = s.view.training.history
    steps = history.steps(HISTORY_STEPS)
    ratios = history.values("update_ratio", HISTORY_STEPS)
    # The update that a line tells is the one before its step.
    rates = [before for before, _ in pairwise(history.values("lr", HISTORY_STEPS))]
    by_rate = [
        (step, ratio / rate)
        for step, ratio, rate in zip(steps[1:], ratios[1:], rates, strict=True)
        if ratio is not None and rate and math.isfinite(ratio) and ratio > 0
    ]
    well = cut.since - s.config.stability.margin_steps
    before = [value for step, value in by_rate if step <= well][-COMPARED:]
    now = [value for step, value in by_rate if step > cut.step][-COMPARED:]
    if len(before) < COMPARED or len(now) < COMPARED:
        return None
    return statistics.median(now) / statistics.median(before)
