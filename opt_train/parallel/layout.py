"""How ranks are arranged: degrees of parallelism as one value that checks itself. Standard library
only."""

from dataclasses import dataclass

from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.exits import BadInput


@dataclass(frozen=True, slots=True)
class Layout:
    """`replicate` x `shard` x `tensor` ranks; rank 0's neighbours in `tensor` come first, then
    `shard`."""

    replicate: int
    """Copies of the sharded state (HSDP)."""
    shard: int
    """Ranks that one copy of the state is spread over (FSDP)."""
    tensor: int
    """Ranks that compute one layer together."""

    def __post_init__(self) -> None:
        for name in ("replicate", "tensor", "shard"):
            if getattr(self, name) < 1:
                raise BadInput(f"parallel.{name}={getattr(self, name)} must be at least 1.")

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "Layout":
        """The layout that `config` means on `world_size` ranks.

        Raises:
            BadInput: the degrees do not multiply to the world size.
        """
        others = config.replicate * config.tensor
        shard = config.shard
        if shard == 0 and others > 0:
            shard = max(1, world_size // others)
        layout = cls(config.replicate, shard, config.tensor)
        if layout.world_size != world_size:
            raise BadInput(
                f"parallel.replicate={config.replicate} x parallel.shard={shard} x "
                f"parallel.tensor={config.tensor} is "
                f"{layout.world_size} ranks, but the cluster has {world_size}; "
                "set parallel.shard=0 and let parallel.replicate x parallel.tensor divide "
                f"{world_size}."
            )
        return layout

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def data_world(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which share of the batch `rank` reads; the ranks of a tensor group read the same one."""
        return rank // self.tensor

    @property
    def mesh(self) -> dict[str, int]:
        """The mesh's dimensions by name, outermost first. Without copies or tensor groups those
        names are not there."""
        # Outermost first: the ranks of a tensor group, which talk most, are neighbours on one node.
        sizes = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}
        return {name: size for name, size in sizes.items() if size > 1 or name == "shard"}

    @property
    def data_mesh(self) -> tuple[str, ...]:
        """The dimensions that FSDP spreads the state over; with two names the first holds
        copies."""
        return tuple(name for name in self.mesh if name != "tensor")

    def gathers(self, precision: PrecisionConfig) -> bool:
        """Whether weights are brought together, or into another type, before they are used.

        A single rank whose weights are in the compute type uses them where they are, and gradients
        arrive where they are kept: FSDP would copy both, and on a CPU take a third more time for a
        step.
        """
        return self.world_size > 1 or precision.weights != precision.compute
