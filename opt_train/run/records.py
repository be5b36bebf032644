"""What a run's state is made of: its nodes, attempts, checkpoints, incidents and orders."""

from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory, tier_of

MEMORY, NODE, SHARED = "memory", "node", "shared"
"""Tiers of checkpoints: held by the nodes' agents in memory, or on the nodes' own disks, or in the
run directory."""
FASTEST_LAST = (SHARED, NODE, MEMORY)

RELATIVE = RunDirectory(Path())


@dataclass(frozen=True, slots=True)
class Node:
    """A node that ever joined or failed. `role` is ``active``, ``buffer`` or ``failed``; a failed
    one stays so."""

    role: str
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt, begun as `generation`. `outcome` is empty while it may have living ranks."""

    name: str
    generation: int
    start_step: int
    nodes: tuple[str, ...]
    world_size: int
    parent: str = ""
    checkpoint: str = ""
    manifest_sha256: str = ""
    lineage: int = 0
    started: float = 0.0
    """Unix seconds of `attempt_started`."""
    leader: int = 0
    """The supervisor that began or last adopted it; another one must look whether its ranks are
    there."""
    incident: int = 0
    in_force: bool = False
    """What is in force was read back and found right."""
    began: bool = False
    """Its first step is done."""
    killed: bool = False
    outcome: str = ""

    @property
    def slots_per_node(self) -> int:
        return max(1, self.world_size // max(1, len(self.nodes)))

    def place_of(self, rank: int) -> tuple[str, int]:
        """Node and slot of `rank`: ranks are numbered node by node, slot by slot."""
        return self.nodes[rank // self.slots_per_node], rank % self.slots_per_node


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
    def is_held(self) -> bool:
        """By agents, and not in the run directory."""
        return self.tier != SHARED


@dataclass(frozen=True, slots=True)
class Incident:
    """An incident that has not been closed. `cause` is empty until it is diagnosed."""

    number: int
    generation: int
    attempt: str
    step: int
    """Last step known to be done when it was seen; training has recovered when it is there
    again."""
    opened: float
    """Unix seconds of `failure_seen`."""
    node: str
    rank: int
    what: str
    sign: str
    cause: str = ""
    detail: str = ""
    culprit: str = ""
    """The node the diagnosis names."""
    strikes: int = 0
    """How often this cause has struck since the last progress, this time included."""
    strikes_in_all: int = 0
    restored_step: int = -1
    """Where the first attempt after it began; -1: none has begun yet."""
    first_step: float = 0.0
    """Unix seconds of the first new step after it; 0: not yet."""


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """The newest order. `outcome` is empty while it is outstanding."""

    number: int
    order: str
    reason: str
    outcome: str = ""
    leader: int = 0
    """The supervisor that gave it."""


def path_of_save(attempt: str, step: int, tier: str = SHARED) -> str:
    """A checkpoint's path relative to the run directory; of one that agents hold only the manifest
    lies there."""
    return str(RELATIVE.checkpoint(attempt, step, tier))
