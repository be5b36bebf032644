"""One message is one line of JSON; this file turns messages into lines and back.

Non-finite numbers travel as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, because JSON
has no word for them: a field of type float is a float again at the other end, and ``float()`` reads
all three where a field is a plain mapping. A fact of a rank fits `MAX_FACT_BYTES`: up to PIPE_BUF a
write to a non-blocking pipe is all or nothing, so lines never tear.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self, get_type_hints

MAX_FACT_BYTES = 4096
"""PIPE_BUF on Linux: the largest write to a pipe that is atomic."""

# A limit against a broken or hostile peer: a line that never ends would otherwise be buffered until
# memory is gone.
MAX_MESSAGE_BYTES = 1 << 20
"""The longest line that agent and supervisor accept from one another."""


MAX_DEPTH = 32
"""Objects and lists within one another. Messages need a quarter of it, and what is deeper could be
read but not written again: the way back to JSON takes more of the interpreter's stack than the way
from it."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class ProtocolError(Exception):
    """A line that is no message: not JSON, too long, of an unknown kind, or with wrong fields."""


class Message:
    """Base of every fact, order and command: a frozen dataclass whose `kind` names it on the
    wire."""

    __slots__ = ()
    # Kinds are published: a class may be renamed, what stands on the wire may not.
    kind: ClassVar[str]
    registry: ClassVar[dict[str, type["Message"]]] = {}

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # dataclass(slots=True) makes the class a second time; the later one, which is the one in
        # use, wins.
        if kind or "kind" in cls.__dict__:
            cls.kind = kind or cls.__dict__["kind"]
            Message.registry[cls.kind] = cls

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """Build the message from its decoded JSON object.

        Raises:
            ProtocolError: a field is missing, unknown or of another type.
        """
        known: type = cls  # mypy takes type[Self] for something that has no hash
        decoders = _decoders_of(known)
        extra = [name for name in payload if name not in decoders and name != "kind"]
        if extra:
            raise ProtocolError(f"{cls.__name__} has no field {min(extra)!r}")
        try:
            return cls(**{k: decoders[k](v) for k, v in payload.items() if k != "kind"})
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
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
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


def to_line(message: Any) -> bytes:
    """`message` as one line, newline included."""
    # allow_nan: a float that slipped past `to_payload` raises here instead of making a line that is
    # no JSON. A lone surrogate, as in a file name that is not UTF-8, becomes a question mark: no
    # fact is lost for its text.
    text = json.dumps(
        to_payload(message), separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
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
        ProtocolError: the line is not a JSON object, or nested deeper than `MAX_DEPTH`.
    """
    try:
        payload = _DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a line of JSON: {error}") from None
    if not isinstance(payload, dict):
        raise ProtocolError("not a JSON object")
    # Most lines have too few brackets to be deep: counting them is quicker than going through.
    brackets = line.count(b"{") + line.count(b"[")
    if brackets > MAX_DEPTH and _is_deeper(payload, MAX_DEPTH):
        raise ProtocolError("nested too deeply")
    return payload


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


# Python would read NaN and Infinity, which JSON does not have and readers in other languages
# refuse.
_DECODER = json.JSONDecoder(parse_constant=_no_json)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether `value` holds more than `levels` objects and lists within one another."""
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(v, levels - 1) for v in inner)


@functools.cache
def _decoders_of(kind: type) -> Mapping[str, Callable[[Any], Any]]:
    """What reads each field of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: _decoder_of(hints[field.name]) for field in fields(kind)}


@functools.cache
def _decoder_of(hint: Any) -> Callable[[Any], Any]:
    """What makes of a JSON value one of a field's type: tuples of lists, messages of objects,
    floats of words. It raises ValueError, TypeError or KeyError for any other value.

    Made once for each type: to ask what a type is takes longer than to read the value.
    """
    origin = getattr(hint, "__origin__", None)
    if origin is tuple:
        inner = _decoder_of(hint.__args__[0])
        return lambda value: tuple([inner(v) for v in _exactly(value, list)])
    if origin is Mapping:
        return lambda value: _exactly(value, dict)
    if isinstance(hint, type) and issubclass(hint, Message):
        return functools.partial(_message, hint)
    if isinstance(hint, type) and is_dataclass(hint):
        decoders = _decoders_of(hint)
        return lambda value: hint(**{k: decoders[k](v) for k, v in value.items()})
    if hint is float:
        return _float
    if hint in (int, str, bool):
        return functools.partial(_exactly, expected=hint)
    arguments = getattr(hint, "__args__", ())
    if type(None) in arguments:
        known = _decoder_of(next(a for a in arguments if a is not type(None)))
        return lambda value: None if value is None else known(value)
    return lambda value: value


def _message(expected: type[Message], value: Any) -> Message:
    message = from_payload(value)
    if not isinstance(message, expected):
        raise ValueError(f"{message.kind} is not {expected.kind}")
    return message


def _float(value: Any) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    number: float = float(value) if type(value) is int else _exactly(value, float)
    return number


def _exactly(value: Any, expected: type) -> Any:
    # Not isinstance: to Python, true is an int.
    if type(value) is not expected:
        raise ValueError(f"{value!r} is not {expected.__name__}")
    return value
