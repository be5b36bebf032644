"""How well a model predicts text it has not seen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opt_train.data.batches import ValidationSet
from opt_train.data.manifest import TRAIN, DatasetManifest
from opt_train.model.decoder import OPT
from opt_train.parallel.measure import loss_over
from opt_train.protocol.exits import BadInput

# A double's exp overflows at 709.8.
LARGEST_EXPONENT = 700.0
"""Beyond it `exp` overflows; such a loss means nothing anyway."""


@dataclass(frozen=True, slots=True)
class MeanLoss:
    """The mean over a validation set."""

    loss: float
    """Cross entropy in nats a token."""
    tokens: int
    """Predicted ones."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, LARGEST_EXPONENT))


def perplexity(
    model: OPT,
    validation: ValidationSet,
    *,
    micro_batch: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> MeanLoss:
    """The model's loss over all whole sequences of a validation set: what training measures too.

    Args:
        model: on `device`, in evaluation mode.
        micro_batch: sequences at once.
        progress: called with the sequences done and in all.
    """
    batches = validation.share(data_rank=0, data_world=1, micro_batch=micro_batch)
    loss_sum, tokens = loss_over(
        model, batches, device, lambda done: progress(done, validation.sequences)
    )
    return MeanLoss(loss_sum / tokens, tokens)


def choose_sets(
    data: Path, dataset: DatasetManifest, wanted: Sequence[str], sequence_length: int
) -> list[str]:
    """The validation sets to measure: those `wanted`, or all that have a whole sequence.

    Raises:
        BadInput: the data holds no such set.
    """
    available = {name: tokens for name, tokens in dataset.splits.items() if name != TRAIN}
    for name in wanted:
        if name not in available:
            raise BadInput(
                f"--set={name} is not in {data}, which holds {', '.join(available)}; "
                "`opt-train prepare` adds what data.validation_sets names"
            )
    return list(dict.fromkeys(wanted)) or [
        name for name, size in available.items() if size > sequence_length
    ]
