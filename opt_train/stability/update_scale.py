"""What the update ratio of all weights is, given that of the sample that is looked at.

The metric looks at so many weights of each tensor at most (`optim.update_ratio.SAMPLE`). So gains
of LayerNorms, which are few and are 1, weigh more in it than among all weights, and the more so the
larger the model is. Adam moves all weights alike, so of either the ratio is proportional to the
root of how many there are, divided by their norm, which is that of the initialisation.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from opt_train.config.run_config import RunConfig

SAMPLE = 1024
"""Weights of each tensor that a rank looks at, as optim.update_ratio has it, which needs torch."""


class Tensors(NamedTuple):
    """Some that are alike."""

    number: int
    elements: int
    square: float
    """Mean square of an element after the initialisation."""


def whole_over_sample(config: RunConfig) -> float:
    """By how much the update ratio of all weights exceeds that of the sample, as long as the
    weights are about as large as they were initialised."""
    ranks = max(1, config.world_size)
    whole = [(t.number * t.elements, t.square) for t in _tensors(config)]
    looked_at = [(t.number * _sampled(t.elements, ranks), t.square) for t in _tensors(config)]
    return _ratio_per_update(whole) / _ratio_per_update(looked_at)


def _ratio_per_update(parts: list[tuple[int, float]]) -> float:
    return math.sqrt(sum(n for n, _ in parts) / sum(n * square for n, square in parts))


def _sampled(elements: int, ranks: int) -> int:
    part = -(-elements // ranks)
    return min(elements, ranks * -(-part // -(-part // SAMPLE)))


def _tensors(config: RunConfig) -> Iterator[Tensors]:
    model = config.model
    d, ffn, width, layers = model.d_model, model.ffn, model.embedding_width, model.layers
    square = model.init_std**2
    # Those that write into the residual stream are initialised smaller (model/init.py).
    residual = square / (2 * layers)
    norms = 2 * layers + (model.layer_norm == "pre")
    yield Tensors(1, model.vocab_size * width, square)
    yield Tensors(1, model.positions * d, square)
    yield Tensors(2 * (width != d), width * d, square)
    yield Tensors(3 * layers, d * d, square)
    yield Tensors(layers, d * d, residual)
    yield Tensors(layers, d * ffn, square)
    yield Tensors(layers, d * ffn, residual)
    yield Tensors(norms, d, 1.0)
    # Biases: of the norms, of the four projections, of the two products between.
    yield Tensors(norms + 5 * layers, d, 0.0)
    yield Tensors(layers, ffn, 0.0)
