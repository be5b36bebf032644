"""Cross entropy of a tied output head, a slice of the tokens at a time, so that the logits never exist all at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

LOGITS_AT_ONCE = 1 << 25
"""Logits a slice may have: 128 MiB in fp32."""


def cross_entropy_sum(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the tokens' cross entropies, in nats.

    Args:
        hidden: output of the final LayerNorm, [tokens, d_model], in the compute type.
        embedding: the tied matrix, [vocabulary, d_model], in the compute type.
        targets: the next token's id, [tokens].
        weights: what each token counts, [tokens], fp32; 0 for padding.

    Returns:
        A scalar in fp32.
    """
    # Asked here, because inside a Function gradients are off and its inputs do not tell.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or embedding.requires_grad)
    total: Tensor = _HeadAndLoss.apply(hidden, embedding, targets, weights, wanted)  # type: ignore[no-untyped-call]  # torch's
    return total


class _HeadAndLoss(torch.autograd.Function):
    """Forward computes the gradients too, slice by slice, so backward needs no logits and no second product.

    The idea is that of Liger Kernel's fused linear cross entropy (arXiv 2410.10989), in plain torch.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, wanted: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        # fp32, because many slices add up here.
        grad_embedding = torch.zeros_like(embedding, dtype=torch.float32) if wanted else hidden.new_empty(0)
        rows = max(1, LOGITS_AT_ONCE // embedding.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            log_probabilities = F.linear(hidden[part], embedding).float().log_softmax(dim=-1)
            index = targets[part, None]
            total -= (log_probabilities.gather(1, index).squeeze(1) * weights[part]).sum()
            if wanted:
                grad_logits = log_probabilities.exp_()
                grad_logits.scatter_add_(1, index, grad_logits.new_full((), -1.0).expand(index.shape))
                grad_logits *= weights[part, None]
                narrow = grad_logits.to(hidden.dtype)
                grad_hidden[part] = narrow @ embedding
                grad_embedding += narrow.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_embedding.to(embedding.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_embedding * scale, None, None, None
