"""What the ranks of the simulated world train on: data that goes well, but for a range."""

import math
from dataclasses import dataclass

from opt_train.protocol.orders import PROBE_BATCHES


@dataclass
class SimulatedData:
    """The losses that a state has in it."""

    batch: int
    """Samples of a global batch."""
    bad: tuple[int, int] | None = None
    """The range that is bad, in samples of the order of the data."""
    bad_loss: float = math.nan
    odd_ranks: tuple[int, ...] = ()
    """That compute another loss than most from the same batch."""

    def is_bad(self, samples: int) -> bool:
        """Whether the batch that begins at `samples` has something of the bad range."""
        return self.bad is not None and self.bad[0] - self.batch < samples < self.bad[1]

    def loss(self, step: int, samples: int) -> float:
        """Of the state at `step`, of the batch that begins at `samples`."""
        return self.bad_loss if self.is_bad(samples) else 8.0 * (step + 5) ** -0.2

    def probed(self, step: int, place: int) -> float:
        """The mean loss of a probe of the state at `step`."""
        batches = range(place, place + PROBE_BATCHES * self.batch, self.batch)
        return sum(self.loss(step, samples) for samples in batches) / PROBE_BATCHES
