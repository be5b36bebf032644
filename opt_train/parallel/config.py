"""How the work is spread over ranks, and in what precision it is done."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; their product is the world size."""

    replicate: int = 1
    shard: int = 0
    """0: the world size divided by the other two."""
    tensor: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """fp32 master weights throughout; `compute` is what the matrix products run in."""

    compute: str = "bf16"
    """``fp32`` or ``bf16``."""
