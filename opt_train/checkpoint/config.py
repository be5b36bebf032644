"""When state is saved, where, and what is kept."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, POSITIVE

FEWEST_KEPT = 2
"""The newest two good ones of the live chain stay, whatever the configuration says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saves go by step."""

    key_kind: ClassVar = OPERATIONAL

    every_steps: Annotated[int, POSITIVE] = 500
    asynchronous: bool = True
    """Train on while a checkpoint is written: a rank keeps a copy of its part in host memory, as
    large as its files."""
    keep: Annotated[int, POSITIVE] = 3
    """Committed checkpoints to keep; never fewer than the newest two good ones of the live
    chain."""
    keep_hours: Annotated[float, NOT_NEGATIVE] = 0.0
    """Keep those that are younger than this too, measured when the newest was committed; 0: none
    for its age."""
    milestone_every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Never retire a checkpoint of the live chain whose step is a multiple of this; 0: there are no
    milestones."""

    memory_every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between snapshots held in the nodes' memory, with a copy on another node; 0: none. It
    is agents that hold them: a lone `train` takes none."""
    memory_keep: Annotated[int, POSITIVE] = 2
    """Snapshots held at a time, each as large as all that a rank holds, and once more at the
    partner. A rank has memory for one more, which is the one that is being taken."""
    node_every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between snapshots that go on to each node's own disk, a multiple of
    `memory_every_steps`; 0: none."""
    node_keep: Annotated[int, POSITIVE] = 2
    """Snapshots on a node's disk."""
    node_directory: str = ""
    """A folder on the node's own disk; empty: that of temporary files."""

    @property
    def newest_kept(self) -> int:
        """How many are kept for being the newest."""
        return max(self.keep, FEWEST_KEPT)

    def most_kept(self, steps: int, step_seconds: float | None = None) -> int:
        """How many there are at most, at the end of a run of `steps` that never left its chain.

        Args:
            step_seconds: how long a step takes; None: unknown, and none is counted for its age.
        """
        newest = self.newest_kept
        if self.keep_hours and step_seconds:
            young = self.keep_hours * 3600.0 / (self.every_steps * step_seconds)
            newest = max(newest, math.ceil(min(young, steps / self.every_steps)))
        every = self.milestone_every_steps
        if not every:
            return newest
        # A milestone among the newest is counted once.
        return newest + max(0, steps // every - newest * self.every_steps // every)
