"""Frozen dataclasses from plain mappings, strictly: each name and each type is checked, and a
mistake is a sentence."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from opt_train.config.sentences import did_you_mean, shown
from opt_train.protocol.exits import BadInput

Room = TypeVar("Room")

_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


def build(cls: type[Room], values: Any, prefix: str = "") -> Room:
    """The dataclass `cls` from a mapping, checked field by field; what is missing keeps its
    default.

    Raises:
        BadInput: a name is unknown or a value has another type (an int does for a float; nothing
            else converts).
    """
    assert is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise BadInput(
            f"{prefix.rstrip('.')}={values} is not a group of keys; set its keys one by one, as "
            f"{prefix}KEY=VALUE"
        )
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise BadInput(
                f"{key} is no configuration key{did_you_mean(key, [prefix + k for k in known])}"
            )
        if is_dataclass(hints[name]):
            made[name] = build(hints[name], value, f"{key}.")
        else:
            made[name] = _typed(key, value, hints[name], known[name].default)
    result: Room = cls(**made)
    return result


def _typed(key: str, value: object, kind: type, default: object) -> object:
    """`value` as `kind`, or the sentence that says what would do."""
    if kind is float and type(value) is int:
        try:
            value = float(value)
        # An int of YAML's has no bound; a float ends at 1.8e308.
        except OverflowError:
            raise BadInput(
                f"{key} is too large a number; give one like {_example(kind, default)}"
            ) from None
    # Exact types: to isinstance, `true` is an int and would mean one layer.
    if type(value) is not kind:
        if kind is str:
            raise BadInput(
                f"{key}={shown(value)} is not text; put it in quotes: '{key}=\"{value}\"'"
            )
        raise BadInput(
            f"{key}={shown(value)} is not {_KINDS[kind]}; give one like {_example(kind, default)}"
        )
    # YAML writes .inf and .nan; the resolved configuration is JSON, which has neither.
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(
            f"{key}={value} is not a finite number; give one like {_example(kind, default)}"
        )
    return value


def _example(kind: type, default: object) -> str:
    # 6e-4 reads better than 0.0006.
    if kind is float and isinstance(default, float) and 0 < abs(default) < 0.01:
        mantissa, _, exponent = f"{default:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if default is MISSING or isinstance(default, bool):
        return "true" if kind is bool else "1"
    return f"{default:g}" if isinstance(default, float) else str(default)
