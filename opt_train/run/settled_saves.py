"""Which saves of an attempt have come to something, or to nothing: for as long as it matters."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opt_logbook.record.run_directory import tier_of

PATHS_KEPT = 128
"""Of each tier. An attempt may last for months and save every minute: whatever is older than so
many settled saves is settled too, for nobody waits for it any more."""


@dataclass(frozen=True, slots=True)
class SettledSaves:
    """Paths of saves that were committed or abandoned; `path in saves` asks."""

    newest: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By tier, in the order in which they were settled."""
    up_to_step: Mapping[str, int] = field(default_factory=dict)
    """By tier: every save of a step up to this one is settled."""

    def __contains__(self, path: str) -> bool:
        tier = tier_of(path)
        if path in self.newest.get(tier, ()):
            return True
        return -1 < _step_of(path) <= self.up_to_step.get(tier, -1)

    def with_path(self, path: str) -> "SettledSaves":
        """These, and `path`."""
        if path in self:
            return self
        tier = tier_of(path)
        newest, up_to = (*self.newest.get(tier, ()), path), self.up_to_step.get(tier, -1)
        # Saves overtake one another, by a few at most.
        if len(newest) > PATHS_KEPT:
            forgotten, *kept = newest
            newest, up_to = tuple(kept), max(up_to, _step_of(forgotten))
        return SettledSaves({**self.newest, tier: newest}, {**self.up_to_step, tier: up_to})


def _step_of(path: str) -> int:
    """The step that a checkpoint's path ends with; -1: it ends with none."""
    step = path.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1
