"""A journal entry as a line of bytes, and back (docs/journal.md).

A line is one JSON object, in this order: `seq`, `time`, `kind`, `attempt`, `step`, the kind's own
fields, and last `hash`. The hash covers the hash of the line before and every byte of this line
before ``,"hash":``, so a changed, added or removed line is found. It is no signature: who can write
the file can write the hashes too.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, get_args, get_origin, get_type_hints

from opt_logbook.record import (  # noqa: F401 - their kinds are read too
    node_events,
    stability_events,
)
from opt_logbook.record.events import Entry, Event, Unknown

GENESIS = "0" * 64
"""What the first line's hash takes for the hash of the line before."""

RESERVED = ("seq", "time", "kind", "attempt", "step", "hash")
"""Keys of every line; no kind may have a field of such a name."""

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Words for the numbers that JSON does not know."""

_MARK = b',"hash":"'
_TAIL_BYTES = len(_MARK) + 64 + len(b'"}')
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SCHEMAS: dict[type, dict[str, tuple[Any, Field[Any]]]] = {}


class CodecError(Exception):
    """A line that verifies or not, but says nothing this version can read: not JSON, or fields
    missing or mistyped."""


# Time ---------------------------------------------------------------------------------------------


def time_to_text(seconds: float) -> str:
    """Unix seconds as UTC with milliseconds: ``2026-11-22T14:03:05.123Z``."""
    # Whole milliseconds: a time that was read and is written again has the same text.
    moment = _EPOCH + timedelta(milliseconds=round(seconds * 1000))
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def time_from_text(text: str) -> float:
    """Unix seconds, the double nearest to the milliseconds that `text` names.

    Raises:
        ValueError: `text` is not a time as `time_to_text` writes it.
    """
    if not text.endswith("Z"):
        raise ValueError(f"{text!r} is not a UTC time")
    return (
        (datetime.fromisoformat(text[:-1]).replace(tzinfo=UTC) - _EPOCH)
        // timedelta(milliseconds=1)
    ) / 1000


# Lines --------------------------------------------------------------------------------------------


def kind_of(event: Event) -> str:
    """The word that names the event's kind on its line."""
    return event.name if isinstance(event, Unknown) else event.kind


def fields_of(event: Event) -> dict[str, Any]:
    """The event's own fields as JSON values, in the order of its dataclass."""
    return {k: to_json_value(v) for k, v in _values(event).items()}


def encode(entry: Entry, seq: int, previous_hash: str) -> bytes:
    """The line of `entry`, newline included; `entry.seq` and `entry.hash` are not looked at."""
    head = {
        "seq": seq,
        "time": time_to_text(entry.time),
        "kind": kind_of(entry.event),
        "attempt": entry.attempt,
        "step": entry.step,
    }
    own = fields_of(entry.event) | {k: to_json_value(v) for k, v in entry.extra.items()}
    clash = own.keys() & set(RESERVED)
    if clash:
        raise CodecError(f"{head['kind']} has a field {min(clash)!r}, which every line has")
    # One form alone, compact and in this order: the hash is over bytes, not over values.
    text = json.dumps(head | own, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    # A lone surrogate (a log line that was no UTF-8) has no bytes in UTF-8; it becomes a question
    # mark.
    body = text.encode("utf-8", "replace")[:-1]
    return body + _MARK + digest(previous_hash, body).encode() + b'"}\n'


def digest(previous_hash: str, body: bytes) -> str:
    """The hash of a line: `body` is its bytes before ``,"hash":``."""
    return hashlib.sha256(previous_hash.encode() + body).hexdigest()


def split(line: bytes) -> tuple[bytes, str] | None:
    """Body and stored hash of a line without its newline; None where it does not end as a line
    must.

    By position, not by searching: log text inside a field may contain the marker.
    """
    body, tail = line[:-_TAIL_BYTES], line[-_TAIL_BYTES:]
    if not body or not tail.startswith(_MARK) or not tail.endswith(b'"}'):
        return None
    return body, tail[len(_MARK) : -2].decode("ascii", "replace")


def decode(line: bytes) -> Entry:
    """The entry on `line` (with or without its newline). The hash is read, not verified.

    Raises:
        CodecError: the line is not JSON, or a field is missing or of the wrong type.
    """
    payload = parse(line)
    try:
        kind, attempt, step = payload["kind"], payload["attempt"], payload["step"]
        seq, hash_, time = payload["seq"], payload["hash"], time_from_text(payload["time"])
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise CodecError(f"not a journal line: {type(error).__name__} {error}") from None
    right = (
        # Not isinstance, to which `true` is an integer.
        type(seq) is int
        and (step is None or type(step) is int)
        and all(isinstance(v, str) for v in (kind, attempt))
    )
    if not right or not isinstance(hash_, str):
        raise CodecError(
            "not a journal line: seq, kind, attempt, step or hash is of the wrong type"
        )
    own = {k: v for k, v in payload.items() if k not in RESERVED}
    event, extra = _event(kind, own)
    return Entry(time, attempt, step, event, seq, hash_, extra)


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object on `line`.

    Raises:
        CodecError: it is none.
    """
    try:
        payload = json.loads(line)
    # Some thousand brackets on a line exhaust the parser's stack, which is no ValueError.
    except (ValueError, RecursionError) as error:
        raise CodecError(f"not JSON: {error}") from None
    if not isinstance(payload, dict):
        raise CodecError("not a JSON object")
    return payload


def to_json_value(value: Any) -> Any:
    """`value` as JSON knows it: tuples as lists, dataclasses and mappings as objects, non-finite
    numbers as words."""
    if is_dataclass(value) and not isinstance(value, type):
        return {k: to_json_value(v) for k, v in _values(value).items()}
    if isinstance(value, Mapping):
        return {str(k): to_json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        # `json` would write them bare, which is no JSON: another reader would stop at the line.
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _values(instance: Any) -> dict[str, Any]:
    if isinstance(instance, Unknown):
        return dict(instance.fields)
    return {f.name: getattr(instance, f.name) for f in fields(instance)}


# Types --------------------------------------------------------------------------------------------


def _event(kind: str, own: dict[str, Any]) -> tuple[Event, dict[str, Any]]:
    """The event, and the fields that this version does not know."""
    cls = Event.registry.get(kind)
    if cls is None:
        return Unknown(kind, own), {}
    known = _schema(cls)
    missing = [
        name for name, (_, declared) in known.items() if name not in own and _required(declared)
    ]
    if missing:
        raise CodecError(f"{kind} lacks {missing[0]!r}")
    values: dict[str, Any] = {}
    for name, (hint, _) in known.items():
        if name in own:
            try:
                values[name] = _typed(own[name], hint)
            except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
                raise CodecError(f"{kind}.{name}: {error}") from None
    return cls(**values), {k: v for k, v in own.items() if k not in known}


def _schema(cls: type) -> dict[str, tuple[Any, Field[Any]]]:
    """Type and declaration of each field, worked out once a class."""
    if cls not in _SCHEMAS:
        hints = get_type_hints(cls)
        _SCHEMAS[cls] = {f.name: (hints[f.name], f) for f in fields(cls)}
    return _SCHEMAS[cls]


def _required(declared: Field[Any]) -> bool:
    return declared.default is MISSING and declared.default_factory is MISSING


def _typed(value: Any, hint: Any) -> Any:
    """`value` in the field's type: tuples back from lists, dataclasses and mappings from objects,
    floats from words."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list")
        return tuple(_typed(v, get_args(hint)[0]) for v in value)
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not an object")
        return {k: _typed(v, get_args(hint)[1]) for k, v in value.items()}
    if type(None) in get_args(hint):
        return None if value is None else _typed(value, get_args(hint)[0])
    if is_dataclass(hint) and isinstance(hint, type):
        known = _schema(hint)
        # What a newer version added inside such an object is dropped; only the line's own new
        # fields are kept, in `Entry.extra`.
        return hint(**{k: _typed(v, known[k][0]) for k, v in value.items() if k in known})
    if hint is float:
        if isinstance(value, str):
            return NON_FINITE[value]
        # An integer is a number too: other writers print 1.0 as 1. A bool is not, though Python
        # takes it for an integer.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{value!r} is not a number")
        return float(value)
    if hint in (int, str, bool) and type(value) is not hint:
        raise ValueError(f"{value!r} is not of type {hint.__name__}")
    return value
