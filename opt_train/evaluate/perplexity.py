"""How well a model predicts text it has not seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from opt_train.data.batches import ValidationSet
from opt_train.model.decoder import OPT, Loss

LARGEST_EXPONENT = 700.0
"""Beyond it `exp` overflows; such a loss means nothing anyway."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The mean over the validation set."""

    loss: float
    """Cross entropy in nats a token."""
    tokens: int
    """Predicted ones."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, LARGEST_EXPONENT))


@torch.inference_mode()
def perplexity(
    model: OPT,
    validation: ValidationSet,
    *,
    micro_batch: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """The model's loss over all whole sequences of the validation split: what training measures too.

    Args:
        model: on `device`, in evaluation mode.
        micro_batch: sequences at once.
        progress: told sequences done and in all.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens, done = 0, 0
    for batch in validation.share(data_rank=0, data_world=1, micro_batch=micro_batch):
        loss = model(batch.tokens.to(device), batch.targets.to(device), batch.weights.to(device))
        assert isinstance(loss, Loss)
        loss_sum += loss.loss_sum
        sequences = int(batch.weights.sum())
        tokens += sequences * batch.tokens.shape[1]
        done += sequences
        if progress is not None:
            progress(done, validation.sequences)
    return Measured(float(loss_sum) / tokens, tokens)
