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
