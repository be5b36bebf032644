"""How a global batch falls into micro-batches, and what part of them is padding. Standard library
only."""

from dataclasses import dataclass

from opt_train.config.run_config import RunConfig
from opt_train.data.batch_shares import micro_batches_of, share_of
from opt_train.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Batch:
    """What every rank runs in a step (`opt_train.data.batches.Batches.at`): all alike, the largest
    share decides."""

    sequences: int
    """Of the world's global batch."""
    data_ranks: int
    """Ranks, or tensor groups of ranks, that read different sequences."""
    micro_batches: int
    rows: int
    """Sequences of one micro-batch."""

    @classmethod
    def of(cls, config: RunConfig, layout: Layout) -> "Batch":
        """The batch that `config` means under `layout`."""
        return cls.split(config.train.global_batch, layout.data_world, config.train.micro_batch)

    @classmethod
    def split(cls, sequences: int, data_ranks: int, micro_batch: int) -> "Batch":
        """`sequences` shared between `data_ranks`, each share in even micro-batches of
        `micro_batch` at most."""
        return cls(
            sequences,
            data_ranks,
            *micro_batches_of(len(share_of(sequences, 0, data_ranks)), micro_batch),
        )

    @property
    def computed(self) -> int:
        """Sequences that all ranks compute, padding included."""
        return self.data_ranks * self.micro_batches * self.rows

    @property
    def idle_share(self) -> float:
        """The part of the sequences computed that is padding of weight 0."""
        return 1.0 - self.sequences / self.computed

    def best_micro_batch(self) -> int:
        """The largest size of micro-batches, up to this one's, with which least is padded."""
        sizes = range(self.rows, 0, -1)
        best = min(
            sizes, key=lambda size: Batch.split(self.sequences, self.data_ranks, size).computed
        )
        return Batch.split(self.sequences, self.data_ranks, best).rows

    def __str__(self) -> str:
        """Who computes what."""
        each = f"{self.micro_batches} x {self.rows}" if self.micro_batches > 1 else f"{self.rows}"
        if self.data_ranks == 1:
            return f"{self.sequences:,} sequences on 1 data-parallel rank are {each}"
        return (
            f"{self.sequences:,} sequences on {self.data_ranks:,} data-parallel ranks are "
            f"{each} on each"
        )
