"""What one rank sends and receives in a step, by arithmetic on the configuration. Standard library
only.

Counted as a rehearsal counts (`opt_train.rehearsal.rehearse`): the bytes are those of the whole
tensor that is gathered, scattered or reduced over its group. The step stats, a few hundred bytes
on the CPU, is left out.
"""

from collections import Counter
from dataclasses import dataclass

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import tokens_at_once
from opt_train.parallel.layout import Layout
from opt_train.plan.batch import Batch
from opt_train.plan.pieces import block_pieces, padded, root_pieces, sharded
from opt_train.plan.step_memory import SUM_BYTES, WIDTHS


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind over groups of one purpose, in one step."""

    kind: str
    """``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``."""
    group: str
    """``shard``, ``replicate``, ``tensor`` or ``world``."""
    ranks: int
    """The group's size."""
    bytes: int
    """Of all whole tensors together."""
    count: int


def collectives_of(config: RunConfig, layout: Layout) -> list[Collective]:
    """All of a step's, those with most bytes first."""
    tally = _Tally()
    batch = Batch.of(config, layout)
    _weights(tally, config, layout, batch.micro_batches)
    if layout.tensor > 1:
        _tensor(tally, config, layout, batch)
    tally.add("all_reduce", "world", 24, 1)  # squares of the gradient, tokens, losses: fp64
    sizes = {
        "shard": layout.shard,
        "replicate": layout.replicate,
        "tensor": layout.tensor,
        "world": layout.world_size,
    }
    rows = [
        Collective(kind, group, sizes[group], tally.bytes[kind, group], n)
        for (kind, group), n in tally.count.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


class _Tally:
    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.count: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, group: str, size: int, times: int) -> None:
        """`times` collectives on tensors of `size` bytes each."""
        self.bytes[kind, group] += size * times
        self.count[kind, group] += times


def _weights(tally: _Tally, config: RunConfig, layout: Layout, micro_batches: int) -> None:
    """FSDP: a block's weights for each pass, the root's once; gradients summed after each
    micro-batch or the last."""
    model, shard = config.model, layout.shard
    compute = WIDTHS[config.precision.compute]
    sums = micro_batches if config.parallel.accumulate == "shards" else 1
    parts = (
        (block_pieces(model, layout.tensor), model.layers, 2),
        (root_pieces(model, layout.tensor), 1, 1),
    )
    for pieces, times, passes in parts:
        if shard > 1:
            tally.add(
                "all_gather",
                "shard",
                compute * padded(pieces, shard),
                times * passes * micro_batches,
            )
            tally.add("reduce_scatter", "shard", SUM_BYTES * padded(pieces, shard), times * sums)
        if layout.replicate > 1:
            tally.add("all_reduce", "replicate", SUM_BYTES * sharded(pieces, shard), times)


def _tensor(tally: _Tally, config: RunConfig, layout: Layout, batch: Batch) -> None:
    """Sequence parallelism: what is split along the sequence is gathered before matrices and
    scattered behind them."""
    model, times = config.model, batch.micro_batches
    compute = WIDTHS[config.precision.compute]
    tokens = batch.rows * config.data.sequence_length
    hidden, embedded = compute * tokens * model.d_model, compute * tokens * model.embedding_width
    again = config.parallel.activation_checkpointing == "full"
    for kind in ("all_gather", "reduce_scatter"):
        tally.add(kind, "tensor", hidden, 2 * model.layers * (3 if again else 2) * times)
        tally.add(kind, "tensor", embedded, 2 * times)  # of the embedding and of the head
    if again and model.dropout == 0 and model.layer_norm == "pre":
        # With neither a mask nor a norm behind it to make again, a block's last sum is not done
        # again.
        tally.add("reduce_scatter", "tensor", hidden, -model.layers * times)
    if model.embedding_width != model.d_model:
        for size in (embedded, hidden):
            tally.add("all_gather", "tensor", size, times)
            tally.add("reduce_scatter", "tensor", size, times)
            tally.add("all_to_all", "tensor", size, 2 * times)
    # Gradients of what every rank of the group has whole, as they come or, where they wait for the
    # last micro-batch, their sums in fp32. Those of biases behind a scattered product are the same
    # everywhere.
    waiting = config.parallel.accumulate == "whole" and times > 1
    width, sums = (SUM_BYTES, 1) if waiting else (compute, times)
    normed = 4 * model.layers + (2 if model.layer_norm == "pre" else 0)
    tally.add("all_reduce", "tensor", width * model.d_model, normed * sums)
    positions = root_pieces(model, layout.tensor)[1]
    tally.add("all_reduce", "tensor", width * positions.elements, sums)
    rows = tokens_at_once(model.vocab_size // layout.tensor)
    slices = -(-tokens // rows)
    tally.add("all_reduce", "tensor", SUM_BYTES, times)  # the last layer's norm
    for number in range(slices):
        part = min(rows, tokens - number * rows)
        tally.add("all_reduce", "tensor", SUM_BYTES * part, times)  # largest logits
        tally.add(
            "all_reduce", "tensor", 2 * SUM_BYTES * part, times
        )  # sums of exponentials, logits of the targets
