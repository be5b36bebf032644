"""The keys of a configuration as their rooms declare them: name, type, default, kind and laws.

A key's marks stand in its annotation (`opt_train.protocol.keys`); nothing about a key is said in a
second place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from opt_train.protocol.exits import BadInput
from opt_train.protocol.keys import KeyKind, Law


@dataclass(frozen=True, slots=True)
class Key:
    """One value of a configuration, as declared."""

    name: str
    """Dotted: `optim.lr`."""
    type: type
    """``int``, ``float``, ``str`` or ``bool``."""
    default: Any
    kind: KeyKind
    laws: tuple[Law, ...]
    """In the order in which they are asked."""


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key of the dataclass `cls` and of those in it, in the order of declaration.

    Raises:
        TypeError: a key does not carry exactly one of `FIXED`, `TRAINING` and `OPERATIONAL`, nor
            does its room for it.
    """
    hints = get_type_hints(cls, include_extras=True)
    room_kind = getattr(cls, "key_kind", None)
    for field in fields(cls):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from keys_of(hint, f"{name}.")
            continue
        # An annotation without marks is a bare type: its kind is the room's.
        value_type, *marks = get_args(hint) or (hint,)
        kinds = [mark for mark in marks if isinstance(mark, KeyKind)]
        if room_kind is not None:
            kinds.append(room_kind)
        if len(kinds) != 1:
            raise TypeError(f"{name} must be declared FIXED, TRAINING or OPERATIONAL, once")
        laws = tuple(mark for mark in marks if isinstance(mark, Law))
        yield Key(name, value_type, field.default, kinds[0], laws)


def obey_laws(config: Any) -> None:
    """Refuse the first value of the configuration that its own key's laws do not allow.

    Raises:
        BadInput: what the law says of it.
    """
    for key in keys_of(type(config)):
        value = config
        for part in key.name.split("."):
            value = getattr(value, part)
        for law in key.laws:
            if not law.allows(value):
                raise BadInput(law.refusal(key.name, value))
