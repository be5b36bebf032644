"""When state is saved and what is kept."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saves go by step."""

    every_steps: int = 500
    keep: int = 3
    """Committed checkpoints to keep; never fewer than the newest two good ones of the live chain."""
