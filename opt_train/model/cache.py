"""Keys and values of tokens that a decoder has already seen, so that the next token costs one
token's work."""

import torch
from torch import Tensor


class KeyValues:
    """One layer's part: room for `capacity` tokens, made when the first come and their shape and
    type are known."""

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of further tokens; returns those of all tokens so far.

        Args:
            key, value: [batch, heads, new tokens, d_model / heads].

        Returns:
            Two views, [batch, heads, all tokens, d_model / heads].
        """
        # All at once: growing by a token would copy everything for every token.
        if self._keys is None or self._values is None:
            self._keys = key.new_empty(*key.shape[:2], self._capacity, key.shape[3])
            self._values = torch.empty_like(self._keys)
        new = slice(self.length, self.length + key.shape[2])
        assert new.stop <= self._capacity, f"{new.stop} tokens in a cache for {self._capacity}"
        self._keys[:, :, new] = key
        self._values[:, :, new] = value
        self.length = new.stop
        return self._keys[:, :, : new.stop], self._values[:, :, : new.stop]


class KeyValueCache:
    """All layers' parts, for one batch of sequences of equal length."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers = [KeyValues(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return self.layers[0].length


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which of `keys` tokens each of the last `queries` may look at, bool [queries, keys]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
