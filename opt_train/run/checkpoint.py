"""A checkpoint of a run as its journal has it: its tier, and the path that names it."""

from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory, tier_of

MEMORY, NODE, SHARED = "memory", "node", "shared"
"""Tiers of checkpoints: held by the nodes' agents in memory, or on the nodes' own disks, or in the
run directory."""
FASTEST_LAST = (SHARED, NODE, MEMORY)

RELATIVE = RunDirectory(Path())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint that has not been retired. `rejected`: it did not verify when it was
    wanted."""

    path: str
    attempt: str
    step: int
    manifest_sha256: str
    healthy: bool = True
    rejected: bool = False
    committed: float = 0.0
    """Unix seconds of `checkpoint_committed`."""
    world_size: int = 0
    """Of one that agents hold: the ranks that made it."""
    config_sha256: str = ""
    """Of one that agents hold: what those ranks were configured with."""

    @property
    def tier(self) -> str:
        """Where its files are: ``memory``, ``node`` or ``shared``."""
        return tier_of(self.path)

    @property
    def is_with_agents(self) -> bool:
        """By agents, and not in the run directory."""
        return self.tier != SHARED


BEGINNING = Checkpoint("", "", 0, "")
"""The state that a run begins with, where it need not be read: its ranks make it."""


def path_of_save(attempt: str, step: int, tier: str = SHARED) -> str:
    """A checkpoint's path relative to the run directory; of one that agents hold only the manifest
    lies there."""
    return str(RELATIVE.checkpoint(attempt, step, tier))
