"""An instability of training that is being answered, as the journal has it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from opt_logbook.record.stability_events import DataProbed, InstabilitySeen

from opt_train.protocol.orders import Order, RollBack, SaveAndStop
from opt_train.run.ledger import Ledger


class ProbeVerdict(StrEnum):
    """What a probe of the data says is behind an alarm."""

    NORMAL = "normal"
    """The data is as usual: an event, or the state that was given up."""
    BAD_DATA = "bad data"
    """The data up to the alarm is not as usual."""
    BAD_STATE = "bad state"
    """Data that was well is not as usual any more: the state that was gone back to is sick too."""
    UNKNOWN = "unknown"
    """Too little is known of what is usual."""


LOWER_LR, GIVE_BACK, TAKE_AGAIN = "lower_lr", "give_back", "take_again"
"""Rungs, as the journal names them, that change what of the learning rate may be given back. The
one that begins a run again with a lower rate is not among them: it is the rate that was wrong."""
HAND_OVER = "hand_over"
"""The rung with which the supervisor leaves it to a person."""
LR_CUT = "lr_cut"
"""What the journal names in place of an alarm where a learning rate is given back."""
KEPT = "kept"
"""What became of a learning rate that was lowered: it is needed so."""
APART_STEPS = 1024
"""A rate that has to be lowered again so soon after it was given back is not given back again."""


@dataclass(frozen=True, slots=True)
class Instability:
    """From its first alarm until it is judged."""

    number: int
    alarm: str
    """The newest one's name."""
    step: int
    """The furthest step that an alarm was raised at."""
    what: str = ""
    """What the newest alarm says; with its step, ratio and scale it is the same alarm again."""
    alarm_step: int = 0
    ratio: float = 1.0
    scale: float = 0.0
    acts: int = 1
    loss: float = 0.0
    """At the first alarm."""
    samples: int = 0
    """Of the order of the data consumed at the newest alarm."""
    rung: str = ""
    """What is done about its newest alarm."""
    lr_factor: float = 1.0
    """By which that changes the learning rate."""
    answered: bool = False
    """The order that its newest alarm calls for has been given."""
    verdict: str = ""
    """What the data looked like to the state that was gone back to last; empty: nobody has said."""
    probed_step: int = 0
    """Of the state that was probed with."""
    passes_from: int = 0
    passes_to: int = 0
    """Samples of the order of the data from there to here are bad, and no order to leave them out
    has been given yet; 0: there is nothing to order."""
    rescales: int = 0
    """What was done in place, which is not among `acts`."""
    order: int = 0
    """By which the newest alarm is answered in place; 0: by going back."""

    def after_alarm(self, event: InstabilitySeen, step: int) -> "Instability":
        """It has come, or come again. The loss of the first alarm stays, which the judgement
        compares with."""
        return replace(
            self,
            alarm=event.alarm,
            step=max(step, self.step),
            what=event.what,
            alarm_step=step,
            ratio=event.ratio,
            scale=event.scale,
            acts=self.acts + (not event.order),
            rescales=self.rescales + bool(event.order),
            order=event.order,
            samples=event.samples,
            rung=event.rung,
            lr_factor=event.lr_factor,
            answered=False,
        )

    def after_probe(self, event: DataProbed, step: int) -> "Instability":
        """The data has been looked at by the state of `step`."""
        is_bad = event.verdict == ProbeVerdict.BAD_DATA
        return replace(
            self,
            verdict=event.verdict,
            probed_step=step,
            passes_from=event.bad_from if is_bad else 0,
            passes_to=event.bad_to if is_bad else 0,
        )

    def after_order(self, order: Order) -> "Instability":
        """`order` has been given, by whomever."""
        if not isinstance(order, RollBack):
            is_it = isinstance(order, SaveAndStop) or order.number == self.order
            return replace(self, answered=self.answered or is_it)
        # The one that passes what was found bad; any other makes it a matter of the past.
        if self.passes_to:
            return replace(self, passes_from=0, passes_to=0)
        # Whoever hands over goes back first, and the stop comes behind.
        return replace(self, answered=self.rung != HAND_OVER, verdict="")


def answered_up_to(
    unstable: Instability | None, outstanding: Iterable[int], ledger: Ledger
) -> float:
    """The step up to which alarms of the live attempt are answered in place; infinity while the
    ranks have not obeyed yet, and -1 where nothing is.

    Args:
        outstanding: numbers of the orders that were neither obeyed nor withdrawn.
    """
    if unstable is None or not unstable.order:
        return -1.0
    if unstable.order in outstanding:
        return math.inf
    # Steps that were trained before it was obeyed say nothing of what it has done.
    obeyed = (entry.step for entry in ledger if entry.order.number == unstable.order)
    return float(max(obeyed, default=-1))


@dataclass(frozen=True, slots=True)
class LrCut:
    """What the supervisor has taken of the learning rate, to put training right."""

    factor: float
    """Of the rate's schedule, as far as it has not been given back."""
    since: int
    """The step of the alarm that it was taken for first."""
    step: int
    """At which it was changed last."""
    given: float = 1.0
    """What it was multiplied by at that step, where that gave back."""
    kept: bool = False
    """It stays for good: it is needed, or giving it back was tried."""

    @property
    def may_be_given_back(self) -> bool:
        return self.factor < 1 and not self.kept


def lr_cut_after(cut: LrCut | None, event: InstabilitySeen, step: int) -> LrCut | None:
    """What has been taken of the learning rate once `event` has happened at `step`."""
    factor = event.lr_factor
    if event.rung == LOWER_LR and factor < 1:
        if cut is not None and cut.may_be_given_back:
            return replace(cut, factor=cut.factor * factor, step=step, given=1.0)
        # What was kept stays taken, and is none of the next.
        again = cut is not None and not cut.kept and step - cut.step < APART_STEPS
        return LrCut(factor, step, step, kept=again)
    if event.rung == GIVE_BACK and cut is not None:
        return replace(cut, factor=min(1.0, cut.factor * factor), step=step, given=factor)
    if event.rung == TAKE_AGAIN and cut is not None:
        return replace(cut, factor=cut.factor * factor, step=step, given=1.0, kept=True)
    return cut
