"""One message is one line of JSON; this file turns messages into lines and back.

Non-finite numbers travel as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, because JSON has no
word for them and ``float()`` reads all three. A fact of a rank fits `MAX_FACT_BYTES`: up to PIPE_BUF a write to a
non-blocking pipe is all or nothing, so lines never tear.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self, get_type_hints

MAX_FACT_BYTES = 4096
"""PIPE_BUF on Linux: the largest write to a pipe that is atomic."""

MAX_MESSAGE_BYTES = 1 << 20
"""The longest line that agent and supervisor accept from one another."""


class ProtocolError(Exception):
    """A line that is no message: not JSON, too long, of an unknown kind, or with wrong fields."""


class Message:
    """Base of every fact, order and command: a frozen dataclass whose `kind` names it on the wire."""

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type["Message"]]] = {}

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # dataclass(slots=True) makes the class a second time; the later one, which is the one in use, wins.
        if kind or "kind" in cls.__dict__:
            cls.kind = kind or cls.__dict__["kind"]
            Message.registry[cls.kind] = cls

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """Build the message from its decoded JSON object.

        Raises:
            ProtocolError: a field is missing or unknown.
        """
        hints = get_type_hints(cls)
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        extra = payload.keys() - names - {"kind"}
        if extra:
            raise ProtocolError(f"{cls.__name__} has no field {sorted(extra)[0]!r}")
        try:
            return cls(**{name: _typed(payload[name], hints[name]) for name in names if name in payload})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ProtocolError(f"{cls.__name__}: {error}") from None


def to_payload(value: Any) -> Any:
    """The JSON value of a message, a dataclass, or a plain value."""
    if is_dataclass(value) and not isinstance(value, type):
        payload = {f.name: to_payload(getattr(value, f.name)) for f in fields(value)}
        return {"kind": value.kind, **payload} if isinstance(value, Message) else payload
    if isinstance(value, Mapping):
        return {str(k): to_payload(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_payload(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def to_line(message: Any) -> bytes:
    """`message` as one line, newline included."""
    text = json.dumps(to_payload(message), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"


def from_line(line: bytes) -> Message:
    """The message that `line` carries.

    Raises:
        ProtocolError: the line is not JSON, or of an unknown kind, or its fields are wrong.
    """
    return from_payload(parse(line))


def from_payload(payload: Any) -> Message:
    """The message of a decoded JSON object; its kind decides the class."""
    kind = payload.get("kind") if isinstance(payload, dict) else None
    if not isinstance(kind, str) or kind not in Message.registry:
        raise ProtocolError(f"unknown message kind {kind!r}")
    try:
        return Message.registry[kind].from_payload(payload)
    except RecursionError:
        raise ProtocolError(f"{kind}: nested too deeply") from None


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object on `line`.

    Raises:
        ProtocolError: the line is not a JSON object.
    """
    try:
        payload = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a line of JSON: {error}") from None
    if not isinstance(payload, dict):
        raise ProtocolError("not a JSON object")
    return payload


def _typed(value: Any, hint: Any) -> Any:
    """`value` in the field's type: tuples back from lists, messages from objects, floats from strings."""
    origin = getattr(hint, "__origin__", None)
    if origin is tuple:
        inner = hint.__args__[0]
        return tuple(_typed(v, inner) for v in value)
    if isinstance(hint, type) and issubclass(hint, Message):
        return from_payload(value) if hint is Message else hint.from_payload(value)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{k: _typed(v, hints[k]) for k, v in value.items()})
    if hint is float:
        return float(value)
    if hint in (int, str, bool):
        if type(value) is not hint:
            raise ValueError(f"{value!r} is not {hint.__name__}")
        return value
    arguments = getattr(hint, "__args__", ())
    if type(None) in arguments:
        return None if value is None else _typed(value, next(a for a in arguments if a is not type(None)))
    return value
