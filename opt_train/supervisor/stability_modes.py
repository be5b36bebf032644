"""How far the supervisor may go about each alarm: `stability.mode`, and others for single ones,
`stability.modes`."""

from collections.abc import Mapping
from functools import cache

from opt_train.config.run_config import RunConfig
from opt_train.config.sentences import did_you_mean
from opt_train.protocol.exits import BadInput
from opt_train.run.instability import LR_CUT
from opt_train.stability.ladder import LADDER, Rung
from opt_train.supervisor.modes import Mode, read_pairs

ADVISE_ONLY = frozenset({"falls_too_well", "plateau", "held_out_gap", "ceiling"})
"""Nothing is done about them unless `stability.modes` says so: that a loss falls well, or does not
fall, is mostly no trouble at all; and logits that have grown beyond their ceiling while training
was well have cured nothing that was measured, as what is sick shows elsewhere too."""


def mode_of(config: RunConfig, alarm: str, rung: str = "") -> Mode:
    """The mode of what is done about `alarm`; with a `rung`, of that rung.

    The rung's own goes before the alarm's, and that before `stability.mode`; `supervisor.mode`
    holds each of them back further.
    """
    modes = modes_of(config.stability.modes)
    own = modes.get((alarm, rung)) or modes.get((alarm, ""))
    if own is None:
        most = [Mode(config.stability.mode), *([Mode.ADVISE] if alarm in ADVISE_ONLY else [])]
        own = _most_cautious(*most)
    return _most_cautious(own, Mode(config.supervisor.mode))


def _most_cautious(*modes: Mode) -> Mode:
    # The enumeration begins with the most cautious one.
    return min(modes, key=list(Mode).index)


@cache
def modes_of(text: str) -> Mapping[tuple[str, str], Mode]:
    """(Alarm, rung) -> mode, as `stability.modes` says; without a rung: for all that have none of
    their own.

    Raises:
        BadInput: a pair is none, or names no alarm, rung or mode, or what is named already.
    """
    example = "rise=observe,update_jump/lower_lr=advise"
    return read_pairs("stability.modes", text, "alarm", example, _alarm_and_rung)


def _alarm_and_rung(name: str) -> tuple[str, str]:
    alarm, slash, rung = name.partition("/")
    if alarm not in (alarms := [*LADDER, LR_CUT]):
        raise BadInput(f"stability.modes: {alarm!r} is no alarm{did_you_mean(alarm, alarms)}")
    if slash and rung not in list(Rung):
        raise BadInput(f"stability.modes: {rung!r} is no rung{did_you_mean(rung, list(Rung))}")
    return alarm, rung
