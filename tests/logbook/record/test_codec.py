"""A line must say what was appended, whoever reads it and whenever."""

import dataclasses
import json
import math
import random
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opt_logbook.record.codec import (
    GENESIS,
    RESERVED,
    CodecError,
    decode,
    digest,
    encode,
    split,
    time_from_text,
    time_to_text,
)
from opt_logbook.record.events import (
    Entry,
    Event,
    Evidence,
    InForceReported,
    Note,
    RunFinished,
    Unknown,
)

KINDS = sorted(Event.registry.items())


def sample_of(hint: Any, draw: random.Random) -> Any:
    """A value of a field's type."""
    if get_origin(hint) is tuple:
        return tuple(sample_of(get_args(hint)[0], draw) for _ in range(2))
    if get_origin(hint) is Mapping:
        of = get_args(hint)[1]
        return {"a": 1, "b": [1.5, None, {"c": "d"}]} if of is Any else {"a": sample_of(of, draw)}
    if hint is Evidence:
        return Evidence("logs/1.00/n/rank0.log", 3, 'quote " backslash \\ newline \n ,"hash":"')
    if type(None) in get_args(hint):
        return draw.choice((None, sample_of(get_args(hint)[0], draw)))
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: sample_of(part, draw) for name, part in hints.items()})
    return {
        int: draw.randrange(99),
        float: draw.random(),
        str: "ümlaut \u2028 \x00",
        bool: draw.random() < 0.5,
    }[hint]


def sample(cls: type[Event], seed: int = 0) -> Event:
    hints = get_type_hints(cls)
    draw = random.Random(seed)
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    return cls(**{field.name: sample_of(hints[field.name], draw) for field in fields})


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_comes_back_as_it_was(kind: str, seed: int) -> None:
    entry = Entry(1795356185.123, "12.43", 7, sample(Event.registry[kind], seed))
    back = decode(encode(entry, 5, GENESIS))
    assert dataclasses.replace(back, seq=0, hash="") == entry
    assert (back.seq, type(back.event)) == (5, Event.registry[kind])


@pytest.mark.parametrize(("kind", "cls"), KINDS)
def test_no_kind_has_a_field_that_every_line_has(kind: str, cls: type[Event]) -> None:
    assert not {f.name for f in dataclasses.fields(cls)} & set(RESERVED)  # type: ignore[arg-type]


def test_the_order_of_a_line_is_the_documented_one() -> None:
    line = encode(Entry(0.0, "1.00", None, Note("a", "b")), 1, GENESIS)
    assert list(json.loads(line)) == [
        "seq",
        "time",
        "kind",
        "attempt",
        "step",
        "author",
        "text",
        "hash",
    ]


@given(st.floats(min_value=0, max_value=4e9))
def test_a_time_survives_to_the_last_bit_of_its_milliseconds(seconds: float) -> None:
    assert time_from_text(time_to_text(seconds)) == round(seconds, 3)


def test_a_time_is_written_in_utc_with_milliseconds() -> None:
    assert time_to_text(1795356185.25) == "2026-11-22T14:03:05.250Z"
    with pytest.raises(ValueError, match="not a UTC time"):
        time_from_text("2026-11-22T14:03:05.250+01:00")


@pytest.mark.parametrize(
    ("number", "word"), [(math.inf, "Infinity"), (-math.inf, "-Infinity"), (math.nan, "NaN")]
)
def test_numbers_that_json_lacks_travel_as_words(number: float, word: str) -> None:
    line = encode(Entry(0.0, "", None, RunFinished(number, 1.0, 2, 3.0)), 1, GENESIS)
    assert json.loads(line)["loss"] == word
    back = decode(line).event
    assert isinstance(back, RunFinished)
    assert repr(back.loss) == repr(number)


def test_what_a_newer_version_wrote_is_kept() -> None:
    body = (
        b'{"seq":1,"time":"2026-11-22T14:03:05.250Z","kind":"gpu_sang","attempt":"","step":null,'
        b'"tune":[1,2]'
    )
    line = body + b',"hash":"' + digest(GENESIS, body).encode() + b'"}\n'
    entry = decode(line)
    assert entry.event == Unknown("gpu_sang", {"tune": [1, 2]})
    assert encode(entry, 1, GENESIS) == line
    body = body.replace(b"gpu_sang", b"note").replace(
        b'"tune":[1,2]', b'"author":"a","text":"b","mood":"good"'
    )
    line = body + b',"hash":"' + digest(GENESIS, body).encode() + b'"}\n'
    entry = decode(line)
    assert (entry.event, entry.extra) == (Note("a", "b"), {"mood": "good"})
    assert encode(entry, 1, GENESIS) == line


@pytest.mark.parametrize(
    "spoil",
    [
        (b'"author":"a",', b""),
        (b'"author":"a"', b'"author":7'),
        (b'"seq":1', b'"seq":true'),
        (b'"seq":1', b'"seq":"1"'),
        (b'"step":3', b'"step":3.5'),
        (b'"attempt":"1.00"', b'"attempt":null'),
        (b"2026-11", b"2026-13"),
        (b'{"seq"', b'["seq"'),
        (b'"a"', b"[" * 99_999),
        (b'"step":3', b'"step":' + b"3" * 9_999),
    ],
)
def test_a_line_with_a_field_that_cannot_be_is_refused_not_guessed(
    spoil: tuple[bytes, bytes],
) -> None:
    line = encode(Entry(1795356185.0, "1.00", 3, Note("a", "b")), 1, GENESIS)
    assert spoil[0] in line
    with pytest.raises(CodecError):
        decode(line.replace(*spoil))


def test_a_log_line_that_is_no_text_does_not_break_the_journal() -> None:
    line = encode(Entry(0.0, "", None, Note("a", "b\udcffc")), 1, GENESIS)
    assert decode(line).event == Note("a", "b?c")


def test_log_text_cannot_forge_the_end_of_a_line() -> None:
    forged = '","hash":"' + "0" * 64 + '"}'
    line = encode(Entry(0.0, "", None, Note("a", forged)), 1, GENESIS)
    parts = split(line[:-1])
    assert parts is not None
    assert digest(GENESIS, parts[0]) == parts[1] == decode(line).hash


def test_a_field_named_like_a_line_s_own_is_refused() -> None:
    with pytest.raises(CodecError, match="'seq'"):
        encode(Entry(0.0, "", None, Unknown("x", {"seq": 9})), 1, GENESIS)


def test_mappings_come_back_typed() -> None:
    entry = Entry(0.0, "", None, InForceReported({"lr": 1e-3, "betas": (0.9, 0.95)}))
    assert decode(encode(entry, 1, GENESIS)).event == InForceReported(
        {"lr": 1e-3, "betas": [0.9, 0.95]}
    )


def test_a_number_of_hundreds_of_digits_is_refused_not_a_crash() -> None:
    line = encode(Entry(0.0, "", None, RunFinished(1.0, 2.0, 3, 4.0)), 1, GENESIS)
    with pytest.raises(CodecError):
        decode(line.replace(b'"seconds":4.0', b'"seconds":1' + b"0" * 400))
