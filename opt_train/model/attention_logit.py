"""The largest attention logit, which no fused attention tells: an early sign of divergence (arXiv
2309.14322).

A product of its own, beside the attention that trains, and out of sight of autograd and the
compiler: so what trains is computed as ever.
"""

import math

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 24
"""Logits a slice of the queries may have: 64 MiB in fp32."""
SAMPLED_QUERIES = 64
"""Positions, the last one among them, that are looked at on every step, of one sequence: all of a
short one. The whole product would cost as much as the attention, in fp32."""
SAMPLE, WHOLE = 0, 1
"""Rows of what `note_logits` notes into."""


class Extent:
    """How far the next forward passes look."""

    # Read inside the operation: what a compiled model is given alike on every step compiles once.
    is_whole = True


@torch.library.custom_op("opt_train::note_logits", mutates_args=("largest",))
def note_logits(largest: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise the row `SAMPLE` of `largest` to the largest logit of a sample of the first sequence;
    the row `WHOLE` to all sequences' where `Extent.is_whole`.

    Args:
        largest: fp32, [2, batch].
        query, key: [batch, heads, sequence, d_model / heads], detached.
    """
    length, width = query.shape[2:]
    # From the last on, backwards: late positions see most keys.
    last = torch.arange(length - 1, -1, -max(1, -(-length // SAMPLED_QUERIES)), device=query.device)
    logits = query[0, :, last].float() @ key[0].float().transpose(-1, -2) / math.sqrt(width)
    future = torch.arange(length, device=query.device) > last[:, None]
    highest = logits.masked_fill_(future, -math.inf).amax()
    largest[SAMPLE, 0] = torch.maximum(largest[SAMPLE, 0], highest)
    if Extent.is_whole:
        _raise_to_largest(largest[WHOLE], query, key)


@torch.library.custom_op("opt_train::note_largest_logits", mutates_args=("largest",))
def note_largest_logits(largest: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise `largest` to the sequences' largest causal logit, q k / sqrt(d_model / heads), over all
    heads.

    Noting the same twice changes nothing, so a recomputed forward pass does no harm. One operation
    to the compiler, whatever it does inside. A NaN stays.

    Args:
        largest: fp32, [batch].
        query, key: [batch, heads, sequence, d_model / heads], detached.
    """
    _raise_to_largest(largest, query, key)


def _raise_to_largest(largest: Tensor, query: Tensor, key: Tensor) -> None:
    batch, heads, length, width = query.shape
    # In fp32: in fp16 the logits that matter most would overflow.
    keys = key.float().transpose(-1, -2)
    rows = max(1, LOGITS_AT_ONCE // (batch * heads * length))
    for start in range(0, length, rows):
        end = min(start + rows, length)
        logits = (query[:, :, start:end].float() / math.sqrt(width)) @ keys[..., :end]
        future = torch.ones(end - start, end, dtype=torch.bool, device=query.device).triu(start + 1)
        logits.masked_fill_(future, -math.inf)
        torch.maximum(largest, logits.amax(dim=(1, 2, 3)), out=largest)
