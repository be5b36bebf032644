"""One attempt of a run as its journal has it: a stretch of training in which `step` only grows."""

from dataclasses import dataclass


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
    rollback: int = 0
    """The order by which the ranks of the attempt before became these; 0: they are new
    processes."""
    lived_as: tuple[str, ...] = ()
    """Every attempt that its processes have been, this one last: of these they may have
    snapshots."""
    generations: tuple[int, ...] = ()
    """What those began as."""
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
