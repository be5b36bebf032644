"""The OPT decoder (arXiv 2205.01068, section 2.1), with the parameter names of Hugging Face's `OPTForCausalLM`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_train.model.config import ModelConfig
from opt_train.model.loss import cross_entropy_sum
from opt_train.model.sizes import POSITION_OFFSET

LAYER_NORM_EPS = 1e-5


class Loss(NamedTuple):
    """Sums over the tokens of a micro-batch; scalars on the device."""

    loss_sum: Tensor
    """Weighted sum of cross entropies in nats, fp32, differentiable."""
    activation_squares: Tensor
    """Weighted sum of the squared L2 norms of the last layer's output, fp32, detached: OPT's divergence signal."""


class Attention(nn.Module):
    """Causal multi-head self-attention with biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, d_model] -> the same shape."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """One pre-LayerNorm decoder layer: attention, then a ReLU feed-forward network, each with a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(config.d_model, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, d_model] -> the same shape."""
        attended = self.self_attn(self.self_attn_layer_norm(hidden))
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        fed = self.fc2(F.relu(self.fc1(self.final_layer_norm(hidden))))
        return hidden + F.dropout(fed, self.dropout, self.training)


class Decoder(nn.Module):
    """Embeddings, blocks and the final LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.positions + POSITION_OFFSET, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [batch, sequence] -> the last layer's output before the final LayerNorm, [batch, sequence, d_model]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device) + POSITION_OFFSET
        hidden: Tensor = self.embed_tokens(tokens) + self.embed_positions(positions)
        for layer in self.layers:
            hidden = layer(hidden)
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

    def forward(self, tokens: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor | Loss:
        """Logits without targets, sums of the loss with them.

        Args:
            tokens: ids, [batch, sequence].
            targets: the next ids, [batch, sequence].
            weights: what each token counts, fp32, [batch] or [batch, sequence]; None: 1 each.

        Returns:
            Logits [batch, sequence, vocabulary] in the compute type, or `Loss`.
        """
        decoder = self.model.decoder
        hidden = decoder(tokens)
        normed = decoder.final_layer_norm(hidden)
        if targets is None:
            return F.linear(normed, decoder.embed_tokens.weight)
        if weights is None:
            weights = torch.ones((), device=tokens.device)
        if weights.ndim == 1:
            weights = weights[:, None]
        weights = weights.to(torch.float32).expand(tokens.shape)
        loss_sum = cross_entropy_sum(
            normed.flatten(0, 1), decoder.embed_tokens.weight, targets.flatten(), weights.flatten()
        )
        squares = hidden.detach().float().square().sum(dim=-1)
        return Loss(loss_sum, (squares * weights).sum())
