"""Whether the data is bad or the state was, told by the losses of a state from before the alarm.

A state that is well finds usual losses in usual data, wherever in the order of the data it looks.
So ranks that go back measure the losses around the alarm before they train on (`RollBack.probe`),
each place a few batches, and what they find separates three things::

    data    ....|bad bad bad bad bad bad|........     stand: where the state gone back to is
            C   S     1 2 3 4 A   B         C         C before the stand: a control; 1 to 4 up to
                                                      the alarm A; beyond it twice as far each time

The control has been trained on and was well: if it is not usual now, the state is what is sick. If
all is usual, the alarm came of an event or of the state that was given up, and the replay that is
under way answers both. If the data up to the alarm is bad, its end is the first usual place behind:
a range is passed whole, as a part that is left is as good as all of it.

Too easy is as bad as too hard: one document again and again, or targets that are the inputs, have
losses far below the usual.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from opt_train.protocol.orders import PROBE_BATCHES
from opt_train.run.instability import ProbeVerdict
from opt_train.stability.level import CONSISTENT

NEAR = 4
"""Places right before the alarm; further back they lie ever further apart."""
BEYOND = 9
"""Places from the alarm on, at 0, 4, 12, 28, ..., 1,020 batches behind it: what is left out is then
at most about twice what is bad."""
REFERENCE_STEPS = 64
"""Losses before the state that is gone back to, which say what is usual."""
ENOUGH = 32
"""Of these, to say anything."""
DEVIATIONS, SHARE = 2.0, 0.05
"""How far from the level of single batches the mean of a place may lie: so many deviations, or this
share of it where that is more."""


@dataclass(frozen=True, slots=True)
class Usual:
    """What the losses of a state are like, in nats per token."""

    level: float
    tolerance: float

    def has(self, loss: float) -> bool:
        """Whether `loss` is as usual, neither too high nor too low."""
        return abs(loss - self.level) <= self.tolerance


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, and the range of bad data in samples of the order of the data, 0 and 0 if
    none."""

    verdict: ProbeVerdict
    bad_from: int = 0
    """Where it was usual last: a place may begin well and end in what is bad."""
    bad_to: int = 0
    """Where it is usual again; where no place was, behind the last one."""
    ends: bool = True
    """A usual place was found behind it."""
    loss: float = 0.0
    """At the place that is furthest from the usual, of those that decided."""


def places(stands_at: int, alarm_at: int, batch: int, control_at: int | None) -> tuple[int, ...]:
    """Where to look, in samples of the order of the data, in its order.

    Args:
        stands_at: where the state that is gone back to stands.
        alarm_at: what had been consumed at the alarm.
        batch: samples of a global batch.
        control_at: where data begins that the state has been trained on last; None: nowhere.
    """
    width = PROBE_BATCHES * batch
    before, at, distance = [], alarm_at - width, width
    while at > stands_at:
        before.append(at)
        distance = distance if len(before) < NEAR else 2 * distance
        at -= distance
    beyond = [alarm_at + width * (2**k - 1) for k in range(BEYOND)]
    # The first data of all is looked at in any case: what it trains on first may be what is bad.
    found = {stands_at, *before, *(place for place in beyond if place > stands_at)}
    return tuple(sorted(found | ({control_at} if control_at is not None else set())))


def usual_of(losses: Sequence[float]) -> Usual | None:
    """What is usual by the newest of `losses`, of a state that is well; None: they are too few."""
    reference = [loss for loss in losses if math.isfinite(loss)][-REFERENCE_STEPS:]
    if len(reference) < ENOUGH:
        return None
    # While the loss falls, the median of all lags behind: by 4 % in a tiny run, most of what is
    # tolerated. So the level is that of a line through the medians of both halves, at its end; one
    # that rises is not followed.
    half = len(reference) // 2
    early, late = statistics.median(reference[:half]), statistics.median(reference[-half:])
    slope = min(0.0, (late - early) / (len(reference) - half))
    level = late + slope * half / 2
    last = len(reference) - 1
    off = [abs(loss - level - slope * (at - last)) for at, loss in enumerate(reference)]
    spread = CONSISTENT * statistics.median(off)
    return Usual(level, max(DEVIATIONS * spread, SHARE * abs(level)))


def diagnose(
    losses: Sequence[tuple[int, float]],
    usual: Usual | None,
    stands_at: int,
    alarm_at: int,
    batch: int,
) -> Finding:
    """What the losses found at places say; `usual` None: only that a loss should be finite.

    Args:
        losses: place and loss, in the order of the data.
        stands_at, alarm_at, batch: as given to `places`.
    """
    bad = [place for place, loss in losses if not _is_usual(loss, usual)]
    known = dict(losses)
    controls = [place for place in bad if place < stands_at]
    if controls or (usual is None and len(bad) == len(losses)):
        return Finding(ProbeVerdict.BAD_STATE, loss=_furthest(known, controls or bad, usual))
    # Up to the place right behind the alarm: the range may have begun with its very batch.
    suspicious = [place for place in bad if place <= max(alarm_at, stands_at)]
    if not suspicious:
        near = [place for place in known if stands_at <= place <= max(alarm_at, stands_at)]
        verdict = ProbeVerdict.NORMAL if usual is not None else ProbeVerdict.UNKNOWN
        return Finding(verdict, loss=_furthest(known, near, usual))
    behind = [place for place, _ in losses if place > suspicious[-1]]
    end = next((place for place in behind if place not in bad), None)
    before = [place for place in known if stands_at <= place < suspicious[0]]
    begin = max(before, default=suspicious[0])
    loss = _furthest(known, suspicious, usual)
    if end is not None:
        return Finding(ProbeVerdict.BAD_DATA, begin, end, loss=loss)
    last = losses[-1][0] + PROBE_BATCHES * batch
    return Finding(ProbeVerdict.BAD_DATA, begin, last, ends=False, loss=loss)


def _is_usual(loss: float, usual: Usual | None) -> bool:
    return math.isfinite(loss) and (usual is None or usual.has(loss))


def _furthest(known: dict[int, float], among: Sequence[int], usual: Usual | None) -> float:
    """The loss of the places `among` that is furthest from the usual."""
    level = usual.level if usual is not None else 0.0

    def distance(loss: float) -> float:
        return abs(loss - level) if math.isfinite(loss) else math.inf

    return max((known[place] for place in among), key=distance, default=0.0)
