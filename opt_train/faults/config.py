"""Which faults a demonstration or a test plants, and where."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """A seeded fault plan, for demonstrations and tests."""

    plan: str = ""
    """Comma-separated ``<kind>@<step>``: ``kill-node@60, kill-rank@120, stop-rank@90,
    kill-supervisor@150``; the seed chooses the victim. Empty: none."""
    seed: int = 0
