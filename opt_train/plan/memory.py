"""What one rank's memory holds, by arithmetic on the configuration. Standard library only.

docs/plan.md explains the numbers, and a rehearsal (`opt_train.rehearsal.rehearse`) checks them.
"""

from dataclasses import dataclass

from opt_train.config.run_config import RunConfig
from opt_train.parallel.layout import Layout
from opt_train.plan.pieces import block_pieces, root_pieces, sharded
from opt_train.plan.step_memory import MOMENT_BYTES, WIDTHS, Allocation, StepMemory

MODES = ("none", "selective", "full")
"""Of activation checkpointing, from most memory to least."""


@dataclass(frozen=True, slots=True)
class Shards:
    """What a rank keeps between steps; bytes. Rank 0's, which has the most."""

    parameters: int
    gradients: int
    """From the backward pass to the update."""
    optimizer: int


@dataclass(frozen=True, slots=True)
class Memory:
    """One rank's memory under one mode of activation checkpointing; bytes."""

    mode: str
    shards: Shards
    activations: int
    """Kept by all blocks from the forward pass of one micro-batch for its backward pass."""
    kept_for_backward: int
    """Those, and what else that forward pass leaves behind: the head's gradients, the root's
    gathered weights."""
    peak: Allocation
    largest_temporary: int
    """The largest single tensor that is no shard."""


def shards_of(config: RunConfig, layout: Layout) -> Shards:
    """Rank 0's shards of parameters, gradients and optimizer state."""
    model, width = config.model, WIDTHS[config.precision.weights]
    blocks = model.layers * sharded(block_pieces(model, layout.tensor), layout.shard)
    count = blocks + sharded(root_pieces(model, layout.tensor), layout.shard)
    return Shards(parameters=width * count, gradients=width * count, optimizer=MOMENT_BYTES * count)


def memory_of(config: RunConfig, layout: Layout, mode: str) -> Memory:
    """What rank 0 holds under `mode` of activation checkpointing, whatever `config` says of it."""
    step = StepMemory(config, layout, mode)
    return Memory(
        mode=mode,
        shards=shards_of(config, layout),
        activations=step.layers * step.block_kept(mode),
        kept_for_backward=step.root_weights + step.model_kept + step.loss_kept,
        peak=max(step.allocations(), key=lambda moment: moment.total),
        largest_temporary=step.largest,
    )
