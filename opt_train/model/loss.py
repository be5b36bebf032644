"""Cross entropy of a tied output head, a slice of the tokens at a time, so that the logits never
exist all at once."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from opt_train.model.sizes import tokens_at_once


def cross_entropy_sum(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    grad_scale: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The weighted sum of the tokens' cross entropies, in nats.

    Args:
        hidden: output of the final LayerNorm, [tokens, d_model], in the compute type.
        embedding: the tied matrix, [vocabulary, d_model], in the compute type. With a `group`, this
            rank's rows of it.
        targets: the next token's id, [tokens].
        weights: what each token counts, [tokens], fp32; 0 for padding.
        grad_scale: fp32 scalar on the device: backward yields gradients of the sum times this. It
            enters where the logits' gradient is still fp32, before fp16 could lose it.
        group: ranks that hold the vocabulary together, equal numbers of rows in the group's order
            (Megatron-LM, arXiv 1909.08053, section 3). All get the same sum; the gradient of
            `hidden` is then this rank's part of a sum.

    Returns:
        A scalar in fp32.
    """
    # Asked here, because inside a Function gradients are off and its inputs do not tell.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or embedding.requires_grad)
    total: Tensor = _HeadAndLoss.apply(
        hidden, embedding, targets, weights, grad_scale, group, wanted
    )  # type: ignore[no-untyped-call]  # torch's
    return total


class _HeadAndLoss(torch.autograd.Function):
    """Forward computes the gradients too, slice by slice, so backward needs no logits and no second
    product.

    The idea is that of Liger Kernel's fused linear cross entropy (arXiv 2410.10989), in plain
    torch.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        embedding: Tensor,
        targets: Tensor,
        weights: Tensor,
        grad_scale: Tensor | None,
        group: dist.ProcessGroup | None,
        wanted: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        # fp32, because many slices add up here.
        grad_embedding = (
            torch.zeros_like(embedding, dtype=torch.float32) if wanted else hidden.new_empty(0)
        )
        # From here on ids count from this rank's first row; others' are below 0 or too large.
        if group is not None:
            targets = targets - dist.get_rank(group) * embedding.shape[0]
        grad_weights = weights if grad_scale is None else weights * grad_scale
        rows = tokens_at_once(embedding.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            gradients = (grad_hidden[part], grad_embedding, grad_weights[part]) if wanted else None
            total += _slice(hidden[part], embedding, targets[part], weights[part], group, gradients)
        ctx.save_for_backward(grad_hidden, grad_embedding.to(embedding.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        # In place: the largest gradient of the model need not exist twice. A second backward finds
        # them changed and raises.
        return grad_hidden.mul_(scale), grad_embedding.mul_(scale), None, None, None, None, None


def _slice(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    group: dist.ProcessGroup | None,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """The loss of a slice of the tokens, whose logits are gone when it returns.

    Args:
        gradients: to write (of `hidden`), to add to (of `embedding`, fp32), and what each token's
            gradient counts.
    """
    index, here = _own_rows(targets[:, None], embedding.shape[0], group)
    log_probabilities, of_target = _log_softmax(
        F.linear(hidden, embedding).float(), index, here, group
    )
    if gradients is not None:
        grad_hidden, grad_embedding, grad_weights = gradients
        grad_logits = log_probabilities.exp_()
        grad_logits.scatter_add_(1, index, -here)
        grad_logits *= grad_weights[:, None]
        narrow = grad_logits.to(hidden.dtype)
        torch.mm(narrow, embedding, out=grad_hidden)
        if narrow.dtype == torch.float32:
            grad_embedding.addmm_(narrow.t(), hidden)
        else:
            grad_embedding += narrow.t() @ hidden
    return -(of_target.squeeze(1) * weights).sum()


def _own_rows(targets: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Which of this rank's logits is the target's, [tokens, 1], and 1.0 where it has it, 0.0 where
    another rank has."""
    if group is None:
        return targets, torch.ones_like(targets, dtype=torch.float32)
    here = (targets >= 0) & (targets < rows)
    return targets.clamp(0, rows - 1), here.float()


def _log_softmax(
    logits: Tensor, index: Tensor, here: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Log probabilities of this rank's part of the vocabulary, and of the targets, [tokens, 1]."""
    if group is None:
        log_probabilities = logits.log_softmax(dim=-1)
        return log_probabilities, log_probabilities.gather(1, index)
    # The maximum first, as in any log-softmax: exponentials of what is left cannot overflow.
    largest = logits.amax(dim=-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits -= largest
    sums = torch.cat(
        [logits.exp().sum(dim=-1, keepdim=True), logits.gather(1, index) * here], dim=-1
    )
    dist.all_reduce(sums, group=group)
    log_sum = sums[:, :1].log()
    logits -= log_sum
    return logits, sums[:, 1:] - log_sum
