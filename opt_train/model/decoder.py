"""The OPT decoder (arXiv 2205.01068, section 2.1), with the parameter names of Hugging Face's
`OPTForCausalLM`.

Two options make the released OPT-350M of it: LayerNorms behind the residuals, and an embedding of
another width.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from opt_train.model.attention_logit import note_logits
from opt_train.model.cache import KeyValueCache, KeyValues, causal_mask
from opt_train.model.config import ModelConfig
from opt_train.model.loss import cross_entropy_sum
from opt_train.model.sizes import POSITION_OFFSET

LAYER_NORM_EPS = 1e-5


class Loss(NamedTuple):
    """Sums over the tokens of a micro-batch; scalars on the device."""

    loss_sum: Tensor
    """Weighted sum of cross entropies in nats, fp32, differentiable."""
    activation_squares: Tensor
    """Weighted sum of the squared L2 norms of the last layer's output, fp32, detached: OPT's
    divergence signal."""


class Attention(nn.Module):
    """Causal multi-head self-attention with biases."""

    largest_logits: Tensor | None
    """fp32, [2, batch]: where the forward pass notes each sequence's largest logit, of a sample and
    of all; None: it does not look."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.largest_logits = None
        # Three matrices and not one: released checkpoints have them so, and tensor parallelism cuts
        # each by heads.
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden: Tensor, past: KeyValues | None = None) -> Tensor:
        """[batch, sequence, d_model] -> the same shape; with `past`, the sequence goes on from the
        tokens in it."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.largest_logits is not None:
            note_logits(self.largest_logits, query.detach(), key.detach())
        # Without a mask the fused kernels know what is causal; with one they read it.
        mask = None
        if past is not None:
            key, value = past.extended(key, value)
            mask = causal_mask(query.shape[2], key.shape[2], hidden.device)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None
        )
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """One decoder layer: attention, then a ReLU feed-forward network, each with a residual and a
    LayerNorm.

    The LayerNorm stands before the work (``pre``) or behind the residual (``post``).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.normed_before = config.layer_norm == "pre"
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(config.d_model, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)

    def forward(self, hidden: Tensor, past: KeyValues | None = None) -> Tensor:
        """[batch, sequence, d_model] -> the same shape."""
        normed = self._before(self.self_attn_layer_norm, hidden)
        # Training never passes a cache: hooks and recomputation see one input.
        attended = self.self_attn(normed) if past is None else self.self_attn(normed, past)
        hidden = self._behind(
            self.self_attn_layer_norm, hidden + F.dropout(attended, self.dropout, self.training)
        )
        fed = self.fc2(F.relu(self.fc1(self._before(self.final_layer_norm, hidden))))
        return self._behind(
            self.final_layer_norm, hidden + F.dropout(fed, self.dropout, self.training)
        )

    def _before(self, layer_norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        normed: Tensor = layer_norm(hidden) if self.normed_before else hidden
        return normed

    def _behind(self, layer_norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        normed: Tensor = hidden if self.normed_before else layer_norm(hidden)
        return normed


class Decoder(nn.Module):
    """Embeddings, blocks and the final LayerNorm; projections where the token embedding has another
    width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = nn.Embedding(config.positions + POSITION_OFFSET, config.d_model)
        # Without biases, as in the released OPT-350M.
        projected = width != config.d_model
        self.project_in = nn.Linear(width, config.d_model, bias=False) if projected else None
        self.project_out = nn.Linear(config.d_model, width, bias=False) if projected else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        normed = config.layer_norm == "pre"
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS) if normed else None

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Ids [batch, sequence] -> the last layer's output before the final LayerNorm, [batch,
        sequence, d_model].

        With a `cache` the tokens go on from those that it holds, and are added to it.
        """
        first = POSITION_OFFSET
        if cache is not None:
            first += cache.length
        positions = torch.arange(tokens.shape[1], device=tokens.device) + first
        embedded: Tensor = self.embed_tokens(tokens)
        if self.project_in is not None:
            embedded = self.project_in(embedded)
        hidden: Tensor = embedded + self.embed_positions(positions)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden) if cache is None else layer(hidden, cache.layers[number])
        return hidden

    def to_head(self, hidden: Tensor) -> Tensor:
        """What the tied head multiplies: `forward`'s output -> [batch, sequence, width of the token
        embedding]."""
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return hidden


class Model(nn.Module):
    """Only there so that names read `model.decoder...`, as Hugging Face has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)


class OPT(nn.Module):
    """The language model; its output head is the token embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits without targets, sums of the loss with them.

        Args:
            tokens: ids, [batch, sequence].
            targets: the next ids, [batch, sequence].
            weights: what each token counts, fp32, [batch] or [batch, sequence]; None: 1 each.
            grad_scale: fp32 scalar that gradients of the loss are multiplied by; the loss itself is
                not.

        Returns:
            Logits [batch, sequence, vocabulary] in the compute type, or `Loss`.
        """
        decoder = self.model.decoder
        hidden = decoder(tokens)
        whole, own_rows, group = _for_head(decoder.to_head(hidden), decoder.embed_tokens.weight)
        if targets is None:
            assert group is None, "logits are for a model in one piece"
            return F.linear(whole, own_rows)
        if weights is None:
            weights = torch.ones((), device=tokens.device)
        if weights.ndim == 1:
            weights = weights[:, None]
        weights = weights.to(torch.float32).expand(tokens.shape)
        loss_sum = cross_entropy_sum(
            whole.flatten(0, 1), own_rows, targets.flatten(), weights.flatten(), grad_scale, group
        )
        # In fp32: the square of an activation beyond 255 overflows fp16.
        squares = hidden.detach().float().square().sum(dim=-1)
        # Under sequence parallelism `hidden` is this rank's part of the sequence.
        if group is not None:
            weights = weights.chunk(group.size(), dim=1)[group.rank()]
        activation_squares = (squares * weights).sum()
        if group is not None:
            dist.all_reduce(activation_squares, group=group)
        return Loss(loss_sum, activation_squares)

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """What may follow the tokens that `cache` holds and then `tokens`, which it holds
        afterwards.

        For a model in one piece, without gradients.

        Args:
            tokens: ids, [batch, sequence].

        Returns:
            Logits of the token after the last, [batch, vocabulary], in the compute type.
        """
        decoder = self.model.decoder
        hidden = decoder.to_head(decoder(tokens, cache)[:, -1])
        return F.linear(hidden, decoder.embed_tokens.weight)


def _for_head(normed: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, dist.ProcessGroup | None]:
    """What the head multiplies: [batch, sequence, width], its rows of the vocabulary, and who has
    the other rows.

    Under tensor parallelism `normed` arrives in parts of the sequence, which are gathered; its
    gradient is summed and split again on the way back.
    """
    if not isinstance(embedding, DTensor):
        return normed, embedding, None
    part = DTensor.from_local(normed, embedding.device_mesh, [Shard(1)])
    whole = part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return whole, embedding.to_local(), embedding.device_mesh.get_group()
