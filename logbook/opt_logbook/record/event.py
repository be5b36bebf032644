"""The base of what can happen to a run; the kinds are in events.py."""

from typing import Any, ClassVar


class Event:
    """Base of the kinds; `registry` maps a line's `kind` to its class."""

    kind: ClassVar[str]
    # In the order of this file, which is that of docs/journal.md.
    registry: ClassVar[dict[str, type["Event"]]] = {}

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # dataclass(slots=True) makes the class a second time; the later one, which is the one in
        # use, wins.
        if kind or "kind" in cls.__dict__:
            cls.kind = kind or cls.__dict__["kind"]
            Event.registry[cls.kind] = cls
