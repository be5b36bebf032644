"""How far the supervisor may go by itself (invariant 14, the robot is on a leash): a mode for all
it does, `supervisor.mode`, and others for single causes, `supervisor.modes`."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache

from opt_train.config.sentences import did_you_mean, listed
from opt_train.diagnosis.causes import DETAILS, Cause
from opt_train.protocol.exits import BadInput
from opt_train.supervisor.config import SupervisorConfig


class Mode(StrEnum):
    """How far the supervisor may go by itself. In the first two the journal says what would have
    been done; a run that has failed then waits for a person."""

    OBSERVE = "observe"
    """For a response that is being tried out: it is only recorded."""
    ADVISE = "advise"
    """The record is a recommendation to whoever reads the chronicle."""
    ACT = "act"


def mode_of(cause: str, detail: str, config: SupervisorConfig) -> Mode:
    """The mode of the response to `cause` with `detail`: the detail's own goes before the cause's,
    and that before `supervisor.mode`."""
    modes = modes_of(config.modes)
    return modes.get((cause, detail)) or modes.get((cause, "")) or Mode(config.mode)


@cache
def modes_of(text: str) -> Mapping[tuple[str, str], Mode]:
    """(Cause, detail) -> mode, as `supervisor.modes` says; without a detail: for all that have
    none of their own.

    Raises:
        BadInput: a pair is none, or names no cause, detail or mode, or what is named already.
    """
    # Asked for each finding and each incident, of one text a run: it is read once.
    example = "straggler=observe,gpu_ecc/remap_pending=advise"
    return read_pairs("supervisor.modes", text, "cause", example, _cause_and_detail)


def read_pairs(
    key: str, text: str, what: str, example: str, names_of: Callable[[str], tuple[str, str]]
) -> Mapping[tuple[str, str], Mode]:
    """What `names_of` makes of each name -> its mode, of a text such as ``a=observe,b/c=advise``.

    Args:
        key: of the configuration, for whom it may concern.
        what: is on the left of a pair.

    Raises:
        BadInput: a pair is none, or names no mode, or what is named already; and what `names_of`
            raises.
    """
    modes: dict[tuple[str, str], Mode] = {}
    for pair in text.split(",") if text.strip() else ():
        name, equals, mode = (part.strip() for part in pair.partition("="))
        if not equals:
            raise BadInput(
                f"{key}: {pair.strip()!r} is not {what}=mode; write pairs like {example}"
            )
        names = names_of(name)
        if mode not in list(Mode):
            near = did_you_mean(mode, list(Mode))
            raise BadInput(f"{key}: {mode!r} is no mode of {name}{near}")
        if names in modes:
            raise BadInput(f"{key} names {name} twice; give it one mode")
        modes[names] = Mode(mode)
    return modes


def _cause_and_detail(name: str) -> tuple[str, str]:
    cause, slash, detail = name.partition("/")
    if cause not in list(Cause):
        near = did_you_mean(cause, list(Cause))
        raise BadInput(
            f"supervisor.modes: {cause!r} is no cause{near if 'mean' in near else _LOOK_UP}"
        )
    details = [str(known) for known in DETAILS.get(Cause(cause), ())]
    if slash and detail not in details:
        known = f"use {listed([f'{cause}/{d}' for d in details])}" if details else f"use {cause}"
        raise BadInput(f"supervisor.modes: {name!r} is no detail that has a response; {known}")
    return cause, detail


_LOOK_UP = "; docs/causes.md lists them"
