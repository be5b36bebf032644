"""Which faults a demonstration or a test plants, and where."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """A seeded fault plan, for demonstrations and tests."""

    key_kind: ClassVar = OPERATIONAL

    plan: str = ""
    """Comma-separated ``<kind>@<step>``: ``kill-node@60, kill-rank@120, stop-rank@90,
    kill-supervisor@150``; the seed chooses the victim. Empty: none."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
