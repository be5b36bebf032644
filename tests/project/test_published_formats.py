"""What has been written must stay readable: kinds and fields of journal and wire are those of
tests/data/formats_of_154853f, whatever their classes are called. New fields are optional."""

import importlib
import json
import pkgutil
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from opt_logbook.record.codec import GENESIS, decode, encode
from opt_logbook.record.events import Event, Unknown

import opt_train.protocol
from opt_train.protocol.framing import Message, from_line, to_payload

FORMATS = Path(__file__).parents[1] / "data" / "formats_of_154853f"
JOURNAL: dict[str, Any] = json.loads((FORMATS / "journal.json").read_text())
RETIRED = {"save"}
"""Kinds of the wire that are gone: no supervisor ever gave the order `save`."""
WIRE: dict[str, Any] = {
    kind: form
    for kind, form in json.loads((FORMATS / "wire.json").read_text()).items()
    if kind not in RETIRED
}

# The registry knows a kind once its module has been imported.
for module in pkgutil.iter_modules(opt_train.protocol.__path__):
    importlib.import_module(f"opt_train.protocol.{module.name}")

PLAIN = ((bool, "true or false"), (int, "integer"), (float, "number"), (str, "text"))


def type_of(hint: Any) -> Any:
    """The type of a field as its values look on a line. Classes count by what they carry: an enum
    of strings is text."""
    arguments = get_args(hint)
    origin = get_origin(hint)
    if type(None) in arguments:
        (other,) = (argument for argument in arguments if argument is not type(None))
        return {"or_null": type_of(other)}
    if origin in (Union, types.UnionType):
        assert all(issubclass(one, Message) for one in arguments), f"{hint} is no JSON type"
        return "message"
    if origin is tuple:
        return {"list_of": type_of(arguments[0])}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"object_of": type_of(arguments[1])}
    if hint is Any:
        return "any"
    if hint is Message:
        return "message"
    if issubclass(hint, Message):
        # The base of all orders has no kind: any order may stand there.
        return {"message": hint.kind} if hasattr(hint, "kind") else "message"
    if is_dataclass(hint):
        return {"fields": fields_with_types(hint)}
    return next(name for plain, name in PLAIN if issubclass(hint, plain))


def fields_with_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {
        field.name: {
            "type": type_of(hints[field.name]),
            "required": field.default is MISSING and field.default_factory is MISSING,
        }
        for field in fields(cls)  # type: ignore[arg-type]
    }


def differences(
    published: Mapping[str, Any], today: Mapping[str, Any], within: str = ""
) -> list[str]:
    """What of `published` is not so `today`, and what is new but must be there."""
    found = [f"{within}{name} is gone" for name in published if name not in today]
    for name, field in today.items():
        if name not in published:
            if field["required"]:
                found.append(f"{within}{name} is new and not optional")
            continue
        then = published[name]
        if field["required"] and not then["required"]:
            found.append(f"{within}{name} was optional and is not any more")
        found += type_differences(then["type"], field["type"], f"{within}{name}")
    return found


def type_differences(then: Any, now: Any, where: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        (key,) = then
        if key == "fields":
            return differences(then[key], now[key], f"{where}.")
        return type_differences(then[key], now[key], where)
    return [] if then == now else [f"{where} was {then} and is {now}"]


def missing_from(published: Any, today: Any) -> bool:
    """Whether a value of `published` is not in `today`, which may have more keys."""
    if isinstance(published, dict) and isinstance(today, dict):
        return any(k not in today or missing_from(v, today[k]) for k, v in published.items())
    if isinstance(published, list) and isinstance(today, list):
        return len(published) != len(today) or any(map(missing_from, published, today))
    return bool(published != today)


@pytest.mark.parametrize("kind", JOURNAL)
def test_a_journal_kind_has_the_fields_it_had(kind: str) -> None:
    assert kind in Event.registry
    assert differences(JOURNAL[kind]["fields"], fields_with_types(Event.registry[kind])) == []


@pytest.mark.parametrize("kind", WIRE)
def test_a_wire_kind_has_the_fields_it_had(kind: str) -> None:
    assert kind in Message.registry
    assert differences(WIRE[kind]["fields"], fields_with_types(Message.registry[kind])) == []


@pytest.mark.parametrize("kind", JOURNAL)
def test_a_line_written_then_says_the_same_when_it_is_written_again(kind: str) -> None:
    line = JOURNAL[kind]["line"].encode()
    entry = decode(line)
    assert not isinstance(entry.event, Unknown)
    assert not entry.extra, "a field that has a meaning is read as one without"
    again = json.loads(encode(entry, 1, GENESIS))
    then = json.loads(line)
    assert [key for key in again if key in then] == list(then), "in the same order"
    assert not missing_from({k: v for k, v in then.items() if k != "hash"}, again)
    if again.keys() == then.keys():
        assert encode(entry, 1, GENESIS) == line + b"\n", "to the byte, hash included"


@pytest.mark.parametrize("kind", WIRE)
def test_a_message_sent_then_says_the_same_when_it_is_sent_again(kind: str) -> None:
    line = WIRE[kind]["line"].encode()
    assert not missing_from(json.loads(line), to_payload(from_line(line)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"step": {"type": "text", "required": True}}, ["step was integer and is text"]),
        ({}, ["step is gone"]),
        (
            {
                "step": {"type": "integer", "required": True},
                "new": {"type": "text", "required": True},
            },
            ["new is new and not optional"],
        ),
        (
            {
                "step": {"type": "integer", "required": False},
                "new": {"type": "text", "required": False},
            },
            [],
        ),
    ],
)
def test_a_change_is_seen(change: dict[str, Any], found: list[str]) -> None:
    published = {"step": {"type": "integer", "required": True}}
    assert differences(published, change) == found


def test_the_lists_are_whole() -> None:
    assert (len(JOURNAL), len(WIRE) + len(RETIRED)) == (30, 31)
