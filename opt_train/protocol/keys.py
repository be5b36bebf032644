"""The laws that stand beside a configuration key: which values it may have, and what changing it
means for a run.

    steps: Annotated[int, POSITIVE, TRAINING] = 1000

A room whose keys are all of one kind declares it once, as `key_kind: ClassVar = OPERATIONAL`.
`opt_train.config.keys` reads the marks; rules between keys stand in `opt_train.config.checks`. This
is the only module of ours that a room's `config.py` may import.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class KeyKind(StrEnum):
    """What changing a key means for a run that has begun."""

    FIXED = "fixed"
    """No lineage changes it: the run's checkpoints would not fit the model, nor its cursor the
    data."""
    TRAINING = "training"
    """It decides what is computed: changing it opens a lineage."""
    OPERATIONAL = "operational"
    """Where and how the work is done: it may change between attempts."""


FIXED = KeyKind.FIXED
TRAINING = KeyKind.TRAINING
OPERATIONAL = KeyKind.OPERATIONAL


@dataclass(frozen=True, slots=True)
class Law:
    """What a key's value must be by itself, whatever the other keys are."""

    allows: Callable[[Any], bool]
    sentence: str
    """What a user reads whose value is not allowed, with `{key}` and `{value}`."""
    values: str
    """What is allowed, as docs/configuration.md shows it."""

    def refusal(self, key: str, value: object) -> str:
        """One sentence: why `value` is not possible, and what is."""
        return self.sentence.format(key=key, value=value)


POSITIVE = Law(lambda value: value > 0, "{key}={value} must be larger than 0", "> 0")
NOT_NEGATIVE = Law(lambda value: value >= 0, "{key}={value} must not be negative", ">= 0")
BELOW_ONE = Law(
    lambda value: 0 <= value < 1, "{key}={value} must be at least 0 and below 1", ">= 0, < 1"
)


class Choices(Law):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        named = [word for word in words if word]
        allowed = f"use {' or '.join(named)}" if len(named) > 1 else f"only {named[0]} is known"
        super().__init__(
            allows=lambda value: value in words,
            sentence=f"{{key}}={{value}} is not possible; {allowed}",
            values=", ".join(f"`{word}`" for word in named),
        )


class Matches(Law):
    """Text of a pattern, with the sentence for text that has another."""

    def __init__(self, pattern: str, sentence: str) -> None:
        super().__init__(
            allows=lambda value: re.fullmatch(pattern, value) is not None,
            sentence=sentence,
            values="",
        )


class _PowerOfTwo(Law):
    """A factor by which floats are multiplied exactly; 0 stands for another key's default."""

    def refusal(self, key: str, value: object) -> str:
        assert isinstance(value, float)
        below = 2.0 ** math.floor(math.log2(value))
        return self.sentence.format(key=key, value=value, below=below, above=2 * below)


POWER_OF_TWO = _PowerOfTwo(
    # frexp's mantissa lies in [0.5, 1) and is 0.5 for powers of two alone.
    lambda value: value == 0 or math.frexp(value)[0] == 0.5,
    "{key}={value:g} is no power of two, so scaling would round; use {below:g} or {above:g}",
    "a power of two",
)
