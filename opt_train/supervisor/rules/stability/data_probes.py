"""Rules about what ranks that have gone back say of the data: on record, and bad data is passed.

The ranks do not wait for it, they train the same data again meanwhile. Where that is bad they go
back once more, to the same state, and leave the range out: seconds later. What is to be left out
is in the journal's line of the finding, so that a supervisor that takes over between the finding
and the order gives the order.
"""

import math
from itertools import count

from opt_logbook.record.stability_events import DataProbed

from opt_train.diagnosis.causes import CorruptionDetail
from opt_train.optim.in_force import in_force
from opt_train.protocol.facts import Probed
from opt_train.protocol.orders import PROBE_BATCHES, RollBack, SkipSamples
from opt_train.run.instability import ProbeVerdict
from opt_train.run.rollback import with_rollback
from opt_train.stability.ladder import Rung
from opt_train.stability.metric_history import HISTORY_STEPS
from opt_train.stability.probe import (
    Finding,
    Usual,
    diagnose,
    places,
    usual_of,
)
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.leash import withhold
from opt_train.supervisor.rules.orders import order_given
from opt_train.supervisor.rules.stability import replays
from opt_train.supervisor.stability_modes import mode_of


def report(s: Context) -> list[Decision]:
    """The ranks have looked at the data with the state that they went back to."""
    probed = s.generation.probed
    if probed is None or probed.order <= s.state.probed:
        return []
    usual = usual_of(_losses_before(s, probed.step))
    found = _diagnose(s, probed, usual)
    node = replays.node_of(s, probed.odd_ranks)
    odd = _odd_in_words(probed.odd_ranks, node)
    event = DataProbed(
        order=probed.order,
        verdict=found.verdict,
        what=_in_words(s, probed, found, usual) + odd,
        bad_from=found.bad_from,
        bad_to=found.bad_to,
        places=probed.places,
        losses=probed.losses,
        usual=usual.level if usual is not None else math.nan,
        tolerance=usual.tolerance if usual is not None else math.nan,
    )
    blamed: list[Decision] = []
    # Where most are odd, none is.
    if node and 2 * len(probed.odd_ranks) < s.attempt.world_size:
        blamed = replays.blame(s, node, CorruptionDetail.DISAGREES, odd.removeprefix("; "))
    return [*blamed, Record(event, step=probed.step)]


def pass_bad_data(s: Context) -> list[Decision]:
    """What was trained on again is bad: back once more, and past the end of it."""
    unstable = s.state.instability
    if unstable is None or not unstable.passes_to or s.state.rollback is not None:
        return []
    if not s.state.takes_orders or not s.attempt.began:
        return []
    target = s.state.rollback_target(unstable.probed_step)
    if target is None:
        return []
    step = _step_at(s, target.step, unstable.passes_from)
    samples = unstable.passes_to - _stands_at(s, step)
    if samples <= 0:
        return []
    number = s.state.orders_given + 1
    why = f"the data from sample {unstable.passes_from:,} to {unstable.passes_to:,} is bad"
    asked = [
        RollBack(number, why, target.step, "", 0),
        SkipSamples(number + 1, why, samples, step - target.step),
    ]
    # A supervisor with another mode may have taken over since the alarm.
    mode = mode_of(s.config, unstable.alarm, Rung.SKIP)
    if mode is not Mode.ACT:
        words = f"{why}: back to step {target.step:,}, and {samples:,} samples are left out"
        return withhold(s, "stability/bad_data", (), words, mode)
    given = with_rollback(s.state, asked, s.view.highest_generation)
    return [Record(order_given(order)) for order in given]


def probe_places(s: Context, step: int, alarm_at: int) -> tuple[int, ...]:
    """Where ranks that go back to `step` are to look at the data, for an alarm at which `alarm_at`
    samples had been consumed."""
    batch, stands_at = s.config.train.global_batch, _stands_at(s, step)
    control_step = step - PROBE_BATCHES
    control_at = None
    if control_step >= 0:
        control_at = _stands_at(s, control_step)
        # What was left out in between has not been trained on.
        if stands_at - control_at != PROBE_BATCHES * batch:
            control_at = None
    return places(stands_at, max(alarm_at, stands_at), batch, control_at)


def _stands_at(s: Context, step: int) -> int:
    """Where the state of `step` stands in the order of the data."""
    return int(in_force(s.config, s.state.ledger, step)["samples"])


def _step_at(s: Context, first: int, samples: int) -> int:
    """The first step from `first` on whose batch has something behind `samples`."""
    return next(
        step for step in count(first) if _stands_at(s, step) + s.config.train.global_batch > samples
    )


def _losses_before(s: Context, step: int) -> list[float]:
    """Losses of the live chain up to the state of `step`, oldest first."""
    history = s.view.training.history
    lines = zip(history.steps(HISTORY_STEPS), history.values("loss", HISTORY_STEPS), strict=True)
    return [loss for at, loss in lines if at <= step and loss is not None]


def _diagnose(s: Context, probed: Probed, usual: Usual | None) -> Finding:
    unstable = s.state.instability
    # A probe that nothing unstable is open for any more is on record, and no more.
    alarm_at = unstable.samples if unstable is not None else probed.places[-1]
    losses = sorted(zip(probed.places, probed.losses, strict=False))
    stands_at = _stands_at(s, probed.step)
    return diagnose(losses, usual, stands_at, alarm_at, s.config.train.global_batch)


def _odd_in_words(ranks: tuple[int, ...], node: str) -> str:
    if not ranks:
        return ""
    where = f" on {node}" if node else ""
    if len(ranks) == 1:
        return f"; rank {ranks[0]}{where} computes another loss than others from the same batch"
    named = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"; ranks {named}{where} compute another loss than others from the same batch"


def _in_words(s: Context, probed: Probed, found: Finding, usual: Usual | None) -> str:
    level = f", where it usually is {usual.level:.3f}" if usual is not None else ""
    match found.verdict:
        case ProbeVerdict.BAD_DATA:
            end = f"to {found.bad_to:,}" if found.ends else f"to {found.bad_to:,} and beyond"
            return (
                f"the data is bad: the state of step {probed.step:,} has a loss of "
                f"{found.loss:.3f} there{level}; from sample {found.bad_from:,} {end}"
            )
        case ProbeVerdict.BAD_STATE:
            return (
                f"the state of step {probed.step:,} is not well itself: its loss is "
                f"{found.loss:.3f} on data that was well{level}"
            )
        case ProbeVerdict.UNKNOWN:
            return (
                f"whether the data is bad cannot be told: too few steps lie before step "
                f"{probed.step:,}"
            )
        case _:
            return (
                f"the data is as usual: the state of step {probed.step:,} has a loss of "
                f"{found.loss:.3f} there{level}"
            )
