"""What a person may change of a run while it trains: names, what they take, and the orders that
they become.

`opt-train intervene` leaves a message in the inbox, the supervisor gives the orders, and the ranks
obey at a boundary that they agree on. From there on an intervention is in the ledger, and holds
after each restart.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opt_train.protocol.exits import BadInput
from opt_train.protocol.orders import (
    Order,
    RollBack,
    ScaleEmbeddingGradient,
    ScaleLr,
    SetClip,
    SetLossScale,
    SkipSamples,
)

INTERVENE = "intervene"
"""The kind of message."""
ROLL_BACK = "roll_back"
"""The change that is no lasting order. Whoever gives the order knows which state it is."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that can be changed."""

    what: str
    """For people: what the value is."""
    is_whole: bool
    order: Callable[[int, str, float, int], Order]
    """Of its number, the reason, the value and the global batch."""
    is_power_of_two: bool = False
    of_loss_scale: bool = False
    """Only a run in fp16 has it."""


CHANGES: Mapping[str, Change] = {
    "lr_scale": Change(
        "multiplies the learning rate; above 1 it gives back what was taken, up to the schedule",
        False,
        lambda number, why, value, _: ScaleLr(number, why, value),
    ),
    "clip": Change(
        "the gradient norm that is clipped to",
        False,
        lambda number, why, value, _: SetClip(number, why, value),
    ),
    "skip_batches": Change(
        "leaves out so many of the next batches, for good",
        True,
        lambda number, why, value, batch: SkipSamples(number, why, int(value) * batch),
    ),
    "loss_scale": Change(
        "is the loss scale to go on from",
        False,
        lambda number, why, value, _: SetLossScale(number, why, scale=value),
        is_power_of_two=True,
        of_loss_scale=True,
    ),
    "loss_scale_floor": Change(
        "is what the loss scale falls no further than",
        False,
        lambda number, why, value, _: SetLossScale(number, why, floor=value),
        is_power_of_two=True,
        of_loss_scale=True,
    ),
    "embedding_gradient": Change(
        "multiplies the embedding's gradient, before its norm is taken",
        False,
        lambda number, why, value, _: ScaleEmbeddingGradient(number, why, value),
    ),
    ROLL_BACK: Change(
        "goes back to the newest good state at or before this step; what else is given holds from "
        "there on",
        True,
        lambda number, why, value, _: RollBack(number, why, int(value), "", 0),
    ),
}


def changes_of(assignments: Iterable[str]) -> dict[str, float]:
    """Name -> value of what a person wrote as ``lr_scale=0.9``.

    Raises:
        BadInput: a name is not known, is there twice, or its value is not what it takes.
    """
    changes: dict[str, float] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in CHANGES:
            raise BadInput(
                f"{assignment} is no change; give {', '.join(f'{known}=...' for known in CHANGES)}"
            )
        if name in changes:
            raise BadInput(f"{name} is given twice; give it once")
        changes[name] = _value(name, text)
    return changes


def _value(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(name, value):
        raise BadInput(f"{name}={text} must be {_kind(name)} above 0: it {CHANGES[name].what}")
    return value


def _kind(name: str) -> str:
    if CHANGES[name].is_power_of_two:
        return "a power of two"
    return "a whole number" if CHANGES[name].is_whole else "a number"


def fits(name: str, value: object) -> bool:
    """Whether `value` is one that the change takes."""
    if name not in CHANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not (math.isfinite(value) and value > 0):
        return False
    # A scale that is none would round every gradient.
    if CHANGES[name].is_power_of_two and math.frexp(value)[0] != 0.5:
        return False
    return not CHANGES[name].is_whole or float(value).is_integer()


def orders_of(message: Mapping[str, Any], first_number: int, global_batch: int) -> list[Order]:
    """The orders that a message of kind `INTERVENE` becomes; none where it is not what
    `opt-train intervene` writes."""
    changes = message.get("changes")
    if not isinstance(changes, Mapping) or not all(fits(n, v) for n, v in changes.items()):
        return []
    why = f"{message.get('why', '')} (by {message.get('by', '')})".strip()
    return [
        CHANGES[name].order(number, why, value, global_batch)
        for number, (name, value) in enumerate(changes.items(), start=first_number)
    ]
