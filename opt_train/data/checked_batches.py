"""The static checks of a rank's share of a batch, as the training loop has it on the host."""

from collections.abc import Iterable

import numpy as np

from opt_train.data.batch_checks import BatchChecks, check_batch, outside_of_vocabulary
from opt_train.data.batches import MicroBatch


def check_micro_batches(micro_batches: Iterable[MicroBatch]) -> BatchChecks:
    """What the static checks say of the share; sequences that are padding are left out."""
    parts = []
    for batch in micro_batches:
        # Padding is the same sequence over and over: it would be called duplicates.
        counted = batch.weights.numpy() > 0
        parts.append((batch.tokens.numpy()[counted], batch.targets.numpy()[counted]))
    tokens, labels = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return check_batch(tokens, labels)


def outside_of(micro_batches: Iterable[MicroBatch], vocab_size: int) -> int:
    """Tokens and labels of the share that no row of the embedding is for."""
    return sum(
        outside_of_vocabulary(part.numpy(), vocab_size)
        for batch in micro_batches
        for part in (batch.tokens, batch.targets)
    )
