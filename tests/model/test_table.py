"""The presets against the published table: a parameter count does not tell how many heads there
are."""

import pytest

from opt_train.config.compose import compose
from opt_train.evaluate.published import POST, POST_WIDTH, SHAPES
from opt_train.model.config import ModelConfig

TABLE = {**SHAPES, "opt-175b": (96, 96, 12288)}
"""Layers, heads and d_model (arXiv 2205.01068, table 1); the largest was not released and is not in
`SHAPES`."""


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_the_published_architecture(name: str) -> None:
    layers, heads, d_model = TABLE[name]
    layer_norm, width = ("post", POST_WIDTH) if name == POST else ("pre", 0)
    config = compose([f"model={name}"]).model
    assert config == ModelConfig(
        name=name,
        layers=layers,
        heads=heads,
        d_model=d_model,
        ffn=4 * d_model,
        layer_norm=layer_norm,
        embed_dim=width,
        vocab_size=50272,
        positions=2048,
        dropout=0.1,
        init_std=0.006,
    )
