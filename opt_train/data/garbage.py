"""Batches that are garbage, for demonstrations and tests: what a damaged file is to training."""

import numpy as np
import numpy.typing as npt

from opt_train.data.batches import Batches
from opt_train.data.token_stream import TokenStream
from opt_train.data.tokenizer import PAD


class GarbageBatches(Batches):
    """Global batches of which some have random tokens, wherever and by whatever rank they are
    read."""

    def __init__(
        self,
        tokens: TokenStream,
        sequence_length: int,
        global_batch: int,
        seed: int,
        *,
        garbage: range,
        vocab_size: int,
    ) -> None:
        """`garbage`: which ones, counted from 0 in the order of the data."""
        super().__init__(tokens, sequence_length, global_batch, seed)
        self._garbage, self._vocab_size, self._seed = garbage, vocab_size, seed

    def read(self, position: int) -> npt.NDArray[np.int64]:
        sample = super().read(position)
        if position // self.global_batch in self._garbage:
            # Of the place alone: whoever goes back meets the same again.
            chance = np.random.default_rng((self._seed, position))
            sample = chance.integers(PAD + 1, self._vocab_size, len(sample))
        return sample
