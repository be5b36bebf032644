"""What one rank allocates in the course of a step, moment by moment. Standard library only.

The formulas follow the code, name by name: `opt_train.parallel.fsdp` and torch's FSDP2 beneath it,
`opt_train.parallel.tensor`, `opt_train.model.decoder`, `opt_train.model.loss`,
`opt_train.optim.memory_efficient`. What is a vector and not a matrix is left out of activations:
0.2 % of them at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import tokens_at_once
from opt_train.parallel.layout import Layout
from opt_train.plan.batch import Batch
from opt_train.plan.pieces import block_pieces, elements, padded, root_pieces, sharded

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes an element."""

MOMENT_BYTES = 8
"""Adam's two, in fp32."""

SUM_BYTES = 4
"""Gradients are summed over ranks in fp32."""

UPDATE_BYTES = 28
"""An element, for `MemoryEfficientAdamW`'s fp32 copies of one parameter. torch's fused update needs
none."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is allocated at one moment of a step; bytes."""

    when: str
    shards: int
    """Parameters, optimizer state, and gradients as far as they are there."""
    gathered: int
    """Weights in the compute type: the root's, a block's and the next one's."""
    unsummed: int
    """Gradients on their way to being summed over ranks."""
    activations: int
    """Kept for the backward pass, or computed again for it."""
    temporary: int
    """Gradients of activations, logits, copies for collectives, copies for the update."""

    @property
    def total(self) -> int:
        return self.shards + self.gathered + self.unsummed + self.activations + self.temporary


class StepMemory:
    """The last of a step's micro-batches and the update, on rank 0; all sizes in bytes."""

    def __init__(self, config: RunConfig, layout: Layout, mode: str) -> None:
        model, tensor, shard = config.model, layout.tensor, layout.shard
        batch = Batch.of(config, layout)
        compute, weights = WIDTHS[config.precision.compute], WIDTHS[config.precision.weights]
        block, root = block_pieces(model, tensor), root_pieces(model, tensor)
        self._mode = mode
        self._compute = compute
        self.layers = model.layers
        self._split = tensor > 1
        self._forgets = not self._split and not config.parallel.compile
        self._normed_before = model.layer_norm == "pre"
        self._projected = model.embedding_width != model.d_model

        # Parameters and their gradients.
        several = batch.micro_batches > 1
        self._gathers = layout.gathers(config.precision)
        self._added_whole = several and self._gathers and config.parallel.accumulate == "whole"
        self._added_in_shards = several and not self._added_whole
        self._added_in_place = several and not self._gathers
        count = self.layers * sharded(block, shard) + sharded(root, shard)
        self._state = (weights + MOMENT_BYTES) * count
        self._gradients = weights * count
        self._block_shard, self._root_shard = sharded(block, shard), sharded(root, shard)
        # Replicas add up in fp32 until the last micro-batch, and what they sum over copies stays
        # until it is done.
        copied = layout.replicate > 1
        self._waiting_width = SUM_BYTES if copied else weights
        self._summed_width = weights + (SUM_BYTES if copied and weights != SUM_BYTES else 0)
        largest_shard = max(-(-piece.rows // shard) * piece.columns for piece in (*block, *root))
        self._update_copies = UPDATE_BYTES * largest_shard if weights != SUM_BYTES else 0
        gathered = compute if self._gathers else 0
        self._block_weights, self.root_weights = (
            gathered * padded(block, shard),
            gathered * padded(root, shard),
        )
        self._block_gradients, self._root_gradients = (
            compute * elements(block),
            compute * elements(root),
        )
        summed = SUM_BYTES if self._gathers else 0
        self._block_sum, self._root_sum = (
            summed * padded(block, shard),
            summed * padded(root, shard),
        )
        self._block_whole, self._root_whole = (
            SUM_BYTES * elements(block),
            SUM_BYTES * elements(root),
        )
        self._projection_gradient = compute * model.d_model**2 // tensor
        self._fed_gradient = compute * model.d_model * model.ffn // tensor

        # Hidden states: a rank's part of the sequence, all of it, and the feed-forward network's
        # inside.
        tokens = batch.rows * config.data.sequence_length
        self._tokens = tokens
        self._whole = compute * tokens * model.d_model
        self._part = self._whole // tensor
        self._wide = compute * tokens * model.ffn // tensor
        self._mask = tokens * model.d_model // tensor if model.dropout > 0 else 0
        self._log_sums = 4 * tokens * model.heads // tensor

        # The head and its loss.
        self._head_rows = model.vocab_size // tensor
        self._head_elements = self._head_rows * model.embedding_width
        self._head_gradient = compute * self._head_elements
        self._head_hidden = compute * tokens * model.embedding_width
        self._slice = min(tokens, tokens_at_once(self._head_rows))
        self.loss_kept = self._head_hidden + self._head_gradient

    # What the forward pass leaves behind ----------------------------------------------------------

    def block_kept(self, mode: str) -> int:
        """One block's activations under `mode` of activation checkpointing."""
        if mode == "full":
            return self._part
        return self._computed(mode) - sum(self._forgotten(mode))

    def _computed(self, mode: str) -> int:
        """As `block_kept`, were no LayerNorm's output forgotten."""
        # The inputs of both LayerNorms; of attention's projections and of the feed-forward network,
        # which tensor parallelism gathers; what comes out of the ReLU; two masks of dropout.
        kept = 2 * self._part + 2 * self._whole + self._wide + 2 * self._mask
        return kept if mode == "selective" else kept + self._attention

    def _forgotten(self, mode: str) -> tuple[int, int]:
        """What goes into attention's projections and into the feed-forward network, as far as it is
        not kept."""
        if not self._forgets or mode == "full":
            return 0, 0
        return self._whole if self._normed_before else 0, self._whole

    @property
    def _attention(self) -> int:
        """Queries, keys, values, what comes of them, and the logarithms of the softmax's sums."""
        return 4 * self._part + self._log_sums

    @property
    def model_kept(self) -> int:
        """Activations of the whole model, without the loss."""
        return self.layers * self.block_kept(self._mode) + self._embedding_kept + self._head_kept

    @property
    def _embedding_kept(self) -> int:
        return self._head_hidden if self._projected else 0

    @property
    def _head_kept(self) -> int:
        """Inputs of the final LayerNorm and of the projection to the embedding's width."""
        projected = self._whole if self._split else self._part
        return (self._part if self._normed_before else 0) + (projected if self._projected else 0)

    # Moments --------------------------------------------------------------------------------------

    def allocations(self) -> Iterator[Allocation]:
        """Those one of which is the peak."""
        yield self._loss()
        for block in range(self.layers):
            yield from self._backward(block)
        # The embedding's gradient comes from the head and from below; for a moment their sum stands
        # beside them.
        yield Allocation(
            "the backward pass of the embeddings",
            shards=self._state + self._summed(self.layers),
            gathered=self.root_weights,
            unsummed=self._waiting(0)
            + self._root_gradients
            + 2 * self._head_gradient
            + self._block_sum,
            activations=0,
            temporary=0,
        )
        yield Allocation(
            "the sum of the embeddings' gradients",
            shards=self._state + self._summed(self.layers),
            gathered=0,
            unsummed=self._root_sum
            + (self._root_whole if self._added_whole else self._root_gradients),
            activations=0,
            temporary=0,
        )
        yield Allocation("the update", self._state + self._gradients, 0, 0, 0, self._update_copies)

    def _loss(self) -> Allocation:
        """The head, a slice of the tokens at a time: two such as the logits, or one, its copy and a
        product."""
        logits = self._slice * self._head_rows
        narrow = (
            self._compute if self._compute != SUM_BYTES else 0
        )  # products that are copied to fp32, and back
        product = self._head_gradient if narrow else 0
        logits_bytes = max(2 * SUM_BYTES * logits, (SUM_BYTES + narrow) * logits + product)
        return Allocation(
            "the loss",
            shards=self._state + self._summed(0),
            gathered=self.root_weights
            + self._block_weights,  # the last block's buffer goes when another one comes
            unsummed=self._waiting(self.layers),
            activations=self.model_kept,
            temporary=2 * self._head_hidden + SUM_BYTES * self._head_elements + logits_bytes,
        )

    def _backward(self, block: int) -> Iterator[Allocation]:
        """The backward pass of block number `block`, in which the blocks behind it are done."""
        done = self.layers - block - 1
        shards = self._state + self._summed(done)
        next_weights = self._block_weights if block > 0 else 0
        gathered = self.root_weights + self._block_weights + next_weights
        waiting = self._waiting(block + 1) + self._head_gradient
        summing = waiting + (self._block_sum if done else 0)
        before = block * self.block_kept(self._mode) + self._embedding_kept
        split, part, whole, wide, mask = (
            self._split,
            self._part,
            self._whole,
            self._wide,
            self._mask,
        )
        normed = part if self._normed_before else 0

        own = self._computed("none") if self._mode == "full" else self.block_kept(self._mode)
        if self._mode == "full" and (
            mask or not self._normed_before
        ):  # with nothing to make again it ends before
            # Variables of `Block.forward` live until it returns, and a reduce-scatter along the
            # sequence copies.
            inside = 2 * part + (normed + 2 * whole + part if split else part)
            again = before + own - mask
            yield Allocation(
                "a block's second forward pass", shards, gathered, summing, again, inside
            )
        matrices = 2 * wide + self._fed_gradient
        if split:
            matrices = max(matrices, 2 * whole, whole + wide + self._fed_gradient)
        held = before + own - mask - (part - normed)
        yield Allocation(
            "the backward pass of a feed-forward network",
            shards,
            gathered,
            summing,
            held,
            part + matrices,
        )

        held = before + normed + whole - self._forgotten(self._mode)[0]
        gradients = summing + self._arrived(missing=1)
        if split:
            yield Allocation(
                "the backward pass of attention's projections",
                shards,
                gathered,
                gradients,
                held,
                3 * whole + 2 * part,
            )
        gradients = summing + self._arrived(missing=3)
        yield Allocation(
            "the backward pass of attention",
            shards,
            gathered,
            gradients,
            held + self._attention,
            5 * part,
        )

        if not self._gathers:
            return
        own_gradients = 0 if self._added_whole else self._block_gradients
        gathered = self.root_weights + next_weights
        gradients = waiting + own_gradients + self._block_sum
        yield Allocation(
            "the sum of a block's gradients", shards, gathered, gradients, before, part
        )

    def _arrived(self, missing: int) -> int:
        """The block's own gradients in its backward pass, but for `missing` of attention's
        projections."""
        return (
            0
            if self._added_in_place
            else self._block_gradients - missing * self._projection_gradient
        )

    def _summed(self, done: int) -> int:
        """Gradients in shards when the backward pass of the last micro-batch is through `done`
        blocks."""
        elements_done = done * self._block_shard
        elements_left = (self.layers - done) * self._block_shard + self._root_shard
        left = elements_left * self._waiting_width if self._added_in_shards else 0
        return elements_done * self._summed_width + left

    def _waiting(self, blocks: int) -> int:
        """Whole gradients of the root and of `blocks` blocks that wait for the last micro-batch."""
        return self._root_whole + blocks * self._block_whole if self._added_whole else 0

    @property
    def largest(self) -> int:
        """The largest single tensor."""
        logits, head = SUM_BYTES * self._slice * self._head_rows, SUM_BYTES * self._head_elements
        return max(self._block_sum, self._root_sum, self._wide, self._whole, head, logits)
