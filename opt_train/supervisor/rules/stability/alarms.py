"""Rules about training that goes wrong: an alarm is answered by a rung of the ladder, and judged.

One instability at a time. It is open from its first alarm until training has gone on behind that
for `stability.horizon_steps` without another (it has helped), or until a person must decide. An
alarm meanwhile is a relapse: the next rung, further back.
"""

from collections.abc import Sequence

from opt_logbook.record.stability_events import InstabilityClosed, InstabilitySeen

from opt_train.optim.in_force import in_force
from opt_train.protocol.orders import (
    Order,
    RollBack,
    SaveAndStop,
    ScaleEmbeddingGradient,
    ScaleLr,
    SetLossScale,
    SkipSamples,
)
from opt_train.run.checkpoint import BEGINNING, Checkpoint
from opt_train.run.instability import LR_CUT, Instability, ProbeVerdict
from opt_train.run.rollback import with_rollback
from opt_train.stability.detectors import Alarm
from opt_train.stability.ladder import (
    ADVICE,
    FURTHER_BACK_STEPS,
    LADDER,
    Answer,
    Rung,
    answer,
)
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.leash import withhold
from opt_train.supervisor.rules.orders import order_given
from opt_train.supervisor.rules.stability.data_probes import probe_places
from opt_train.supervisor.rules.stability.learning_rate import may_be_acted_on, taken_again
from opt_train.supervisor.stability_modes import mode_of
from opt_train.supervisor.training_view import answered_in_place

HANDED_OVER, HELPED = "handed over", "helped"
WITHHELD = "stability/"
"""In front of an alarm's name: what would have been done about it, and was not."""


def respond(s: Context) -> list[Decision]:
    """Training goes wrong: go back and put right what the ladder says, or stop for a person."""
    answered = answered_in_place(s.state)
    alarms = [a for a in s.view.training.detectors.alarms.values() if a.step > answered]
    if not s.state.takes_orders:
        return []
    recorded = None
    if (unstable := s.state.instability) is not None and _is_unanswered(s):
        if unstable.alarm == LR_CUT:
            return []  # the raise that is on record is ordered first
        # Whoever leads now was not there to see it.
        recorded = _alarm_of(unstable) if unstable.alarm in LADDER else None
    # The first sign: those behind it may be its consequences. One that is only to be spoken of
    # holds back none.
    alarms.sort(key=lambda alarm: alarm.step)
    if recorded is not None:
        alarms.insert(0, recorded)
    # While a rollback is under way the alarms are those of what is given up.
    if not alarms or not s.attempt.began or s.state.rollback is not None:
        return []
    for alarm in alarms:
        if decisions := _respond_to(s, alarm, unanswered=alarm is recorded):
            return decisions
    return []


def _respond_to(s: Context, alarm: Alarm, *, unanswered: bool) -> list[Decision]:
    """What is done about `alarm`. `unanswered`: it is on record, and its order is not: whoever led
    died in between."""
    unstable = s.state.instability
    acts = rescales = 0
    if unstable is not None:
        # It has not been tried.
        acts = unstable.acts - (unanswered and not unstable.order)
        rescales = unstable.rescales - (unanswered and bool(unstable.order))
    verdict = unstable.verdict if unstable is not None else ""
    ladder = answer(alarm, acts, s.config.stability.acts_max, verdict, rescales)
    found = taken_again(s) or ladder
    target = _target(s, alarm, 0 if found.rung in (Rung.SKIP, Rung.TAKE_AGAIN) else acts)
    # What has been wrong from the first step on has nothing before it but the beginning.
    if found.rung is Rung.RESTART or (found.rung is Rung.RESCALE_BACK and target is None):
        target = BEGINNING
    if found.is_in_place:
        target = None
    elif target is None:
        found = Answer(Rung.HAND_OVER)
    mode = mode_of(s.config, alarm.name, found.rung)
    # Said once an attempt; a person who reads it may order the same by hand.
    if mode is not Mode.ACT:
        words = f"{alarm.what}: {_in_words(s, alarm, found, target)}"
        return withhold(s, f"{WITHHELD}{alarm.name}", (), words, mode)
    # A relapse is the same instability: what was done about it counts.
    number = unstable.number if unstable is not None else s.state.instabilities + 1
    horizon = s.config.stability.horizon_steps
    seen = InstabilitySeen(
        number,
        alarm.name,
        alarm.what,
        found.rung,
        _in_words(s, alarm, found, target),
        f"no alarm before step {alarm.step + horizon:,}",
        s.view.training.history.newest_finite("loss"),
        alarm.samples,
        order=s.state.orders_given + 1 if found.is_in_place else 0,
        lr_factor=found.lr_factor,
        ratio=alarm.ratio,
        scale=alarm.scale,
    )
    decisions: list[Decision] = [] if unanswered else [Record(seen, step=alarm.step)]
    orders: Sequence[Order] = ()
    if found.is_in_place:
        orders = [_in_place(s, alarm, found)]
    elif target is not None:
        orders = _orders(s, alarm, found, target)
        orders = with_rollback(s.state, orders, s.view.highest_generation)
    if found.rung is Rung.HAND_OVER:
        # Behind the rollback: what is saved, and what whoever starts it again goes on from, is a
        # state from before the instability.
        last = max([s.state.orders_given, *(order.last_number for order in orders)])
        why = f"training is unstable and a person must decide: {alarm.what}"
        if alarm.name in ADVICE:
            why += f"; {ADVICE[alarm.name]}"
        orders = (*orders, SaveAndStop(last + 1, why))
    return [*decisions, *(Record(order_given(order)) for order in orders)]


def _is_unanswered(s: Context) -> bool:
    """The newest alarm is on record, and the order that it calls for is not: whoever leads died in
    between."""
    unstable = s.state.instability
    if unstable is None or unstable.answered:
        return False
    # An order in place is named by its number, which another may have taken since.
    return unstable.order in (0, s.state.orders_given + 1)


def _alarm_of(unstable: Instability) -> Alarm:
    """The alarm that was journalled last, as it was raised."""
    return Alarm(
        unstable.alarm,
        unstable.alarm_step,
        unstable.what,
        unstable.ratio,
        unstable.samples,
        unstable.scale,
    )


def close_handed_over(s: Context) -> list[Decision]:
    """The order to stop is given: what is to be done about it is a person's decision now."""
    unstable = s.state.instability
    if unstable is None or unstable.rung != Rung.HAND_OVER or not unstable.answered:
        return []
    closed = InstabilityClosed(unstable.number, HANDED_OVER, unstable.what)
    return [Record(closed, unstable.alarm_step)]


def judge(s: Context) -> list[Decision]:
    """Training has gone on behind the alarm's place as it was expected to."""
    unstable = s.state.instability
    if unstable is None or may_be_acted_on(s) or s.state.rollback is not None:
        return []
    step = s.view.training.history.step
    if step < unstable.step + s.config.stability.horizon_steps:
        return []
    loss = s.view.training.history.newest_finite("loss")
    what = f"the loss is {loss:.3f} at step {step:,}; it was {unstable.loss:.3f} at the alarm"
    return [Record(InstabilityClosed(unstable.number, HELPED, what), step=step)]


def _target(s: Context, alarm: Alarm, acts: int) -> Checkpoint | None:
    # With each relapse further back: what was gone back to may have been sick already.
    behind = s.config.stability.margin_steps + FURTHER_BACK_STEPS * max(0, acts - 1)
    # The second alarm of one may come later than the first: what was before that is well.
    first = min(alarm.step, s.state.instability.step if s.state.instability else alarm.step)
    wanted = max(0, first - behind)
    unstable = s.state.instability
    if unstable is not None and unstable.verdict == ProbeVerdict.BAD_DATA:
        # The state that found it was well, and so is what it has become without it.
        wanted = max(unstable.probed_step, alarm.step - s.config.stability.margin_steps)
    elif unstable is not None and unstable.verdict == ProbeVerdict.BAD_STATE:
        wanted = max(0, unstable.probed_step - FURTHER_BACK_STEPS)
        first = min(first, unstable.probed_step)
    return s.state.rollback_target(wanted) or s.state.rollback_target(max(0, first - 1))


def _orders(s: Context, alarm: Alarm, found: Answer, target: Checkpoint) -> list[Order]:
    number, why = s.state.orders_given + 1, alarm.what
    probe = probe_places(s, target.step, alarm.samples) if found.rung is Rung.REPLAY else ()
    orders: list[Order] = [RollBack(number, why, target.step, "", 0, probe=probe)]
    if found.lr_factor != 1.0:
        orders.append(ScaleLr(number + 1, why, found.lr_factor))
    if found.rung is Rung.SKIP:
        orders.append(SkipSamples(number + 1, why, _skipped(s, alarm, found, target)))
    if found.loss_scale:
        orders.append(SetLossScale(number + 1, why, found.loss_scale, found.loss_scale_floor))
    if found.embedding_factor != 1.0:
        orders.append(ScaleEmbeddingGradient(number + 1, why, found.embedding_factor))
    return orders


def _in_place(s: Context, alarm: Alarm, found: Answer) -> Order:
    """What changes from the next step that the ranks agree on, without going back."""
    number = s.state.orders_given + 1
    return SetLossScale(number, alarm.what, found.loss_scale, found.loss_scale_floor)


def _skipped(s: Context, alarm: Alarm, found: Answer, target: Checkpoint) -> int:
    """Samples from where the state of `target` stands in the data to behind the alarm."""
    batch = s.config.train.global_batch
    stands_at = int(in_force(s.config, s.state.ledger, target.step)["samples"])
    return max(batch, alarm.samples - stands_at + found.beyond_batches * batch)


def _in_words(s: Context, alarm: Alarm, found: Answer, target: Checkpoint | None) -> str:
    if found.is_in_place:
        scale, floor = found.loss_scale, found.loss_scale_floor
        return f"the loss scale is set to {scale:g} and its floor to {floor:g}, in place"
    if target is None:
        return "the run is saved and stopped: a person must decide"
    back = f"back to step {target.step:,}"
    match found.rung:
        case Rung.HAND_OVER:
            return f"{back}, and the run is saved and stopped: a person must decide"
        case Rung.SKIP:
            samples = _skipped(s, alarm, found, target)
            return f"{back}, and past the next {samples:,} samples"
        case Rung.LOWER_LR:
            return f"{back}, with the learning rate times {found.lr_factor:.2g}"
        case Rung.SHRINK_EMBEDDING:
            return f"{back}, with the embedding's gradient times {found.embedding_factor:.2g}"
        case Rung.RESCALE_BACK:
            return f"{back}, with the loss scale at {found.loss_scale:g}"
        case Rung.RESTART:
            return f"from the beginning, with the learning rate times {found.lr_factor:.2g}"
        case Rung.TAKE_AGAIN:
            factor = f"{found.lr_factor:.2g}"
            return f"{back}, with the learning rate, which had been raised, times {factor} for good"
        case _:
            return f"{back}, and the same data again, which is probed first"
