"""The loss of a model over text that it only reads: what training does to validate, and `evaluate`
afterwards."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from opt_train.data.batches import MicroBatch
from opt_train.parallel.engine import loss_of


@torch.no_grad()
def loss_over(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    device: torch.device,
    progress: Callable[[int], None],
) -> tuple[float, int]:
    """Sum of the losses, in nats, and number of the predicted tokens. Padding counts for nothing.

    Args:
        model: on `device`, in evaluation mode, or as in training where dropout is to be in the
            losses. Of several ranks that share it, each gives its own part of the text, in as many
            micro-batches as the others.
        progress: called after each micro-batch with the number of sequences done.
    """
    # fp64: a validation set adds up millions of tokens.
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    sequences = tokens = 0
    for batch in batches:
        loss_sum += loss_of(model, batch, device).loss_sum
        counted = int(batch.weights.sum())
        sequences += counted
        tokens += counted * batch.tokens.shape[1]
        progress(sequences)
    return float(loss_sum), tokens
