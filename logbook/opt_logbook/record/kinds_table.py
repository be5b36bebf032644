"""The table of kinds in docs/journal.md, made from the dataclasses so that it cannot lie."""

import inspect
import re
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from opt_logbook.record import events, node_events, stability_events
from opt_logbook.record.events import Event

MODULES = [module.__name__ for module in (events, node_events, stability_events)]


def kinds_table() -> str:
    """Markdown: every kind of journal line with its fields, in the order of `events.py`, then of
    `node_events.py` and `stability_events.py`."""
    parts = []
    # Whoever imported one of them first does not decide.
    for kind, cls in sorted(
        Event.registry.items(), key=lambda item: MODULES.index(item[1].__module__)
    ):
        hints = get_type_hints(cls)
        items = []
        for field in fields(cls):  # type: ignore[arg-type]  # every registered kind is a dataclass
            optional = field.default is not MISSING or field.default_factory is not MISSING
            items.append(
                f"| `{field.name}` | {_type_name(hints[field.name])} | "
                f"{'optional' if optional else ''} |"
            )
        table = "\n".join(["| field | type | |", "|---|---|---|", *items])
        parts.append(f"### `{kind}`\n\n{_paragraph(cls)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _paragraph(cls: type) -> str:
    """The docstring as one paragraph, in Markdown's code marks."""
    text = re.sub(r"\s+", " ", inspect.getdoc(cls) or "").strip()
    return textwrap.fill(
        re.sub(r"``([^`]+)``", r"`\1`", text), 100, break_long_words=False, break_on_hyphens=False
    )


def _type_name(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"list of {_type_name(get_args(hint)[0])}"
    if type(None) in get_args(hint):
        return f"{_type_name(get_args(hint)[0])}; or null"
    if get_origin(hint) is not None:
        return "object"
    if is_dataclass(hint) and isinstance(hint, type):
        return f"`{hint.__name__}`: {', '.join(part.name for part in fields(hint))}"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[hint]
