"""When state is saved and what is kept."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saves go by step."""

    every_steps: int = 500
    asynchronous: bool = True
    """Train on while a checkpoint is written: a rank copies its part into host memory first, for a restart's sake as
    large as on the disk."""
    keep: int = 3
    """Committed checkpoints to keep; never fewer than the newest two good ones of the live chain."""
