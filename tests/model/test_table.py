"""The presets against the published table: a parameter count does not tell how many heads there are."""

import pytest

from opt_train.config import compose
from opt_train.model.config import ModelConfig

# arXiv 2205.01068, table 1, by hand: layers, heads, d_model.
PUBLISHED = {
    "opt-125m": (12, 12, 768),
    "opt-350m": (24, 16, 1024),
    "opt-1.3b": (24, 32, 2048),
    "opt-2.7b": (32, 32, 2560),
    "opt-6.7b": (32, 32, 4096),
    "opt-13b": (40, 40, 5120),
    "opt-30b": (48, 56, 7168),
    "opt-66b": (64, 72, 9216),
    "opt-175b": (96, 96, 12288),
}
AS_RELEASED = {"opt-350m": ("post", 512)}
"""LayerNorm and width of the embedding, where they are not the paper's (facebook/opt-350m's configuration)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_architecture(name: str) -> None:
    layers, heads, d_model = PUBLISHED[name]
    layer_norm, width = AS_RELEASED.get(name, ("pre", d_model))
    config = compose([f"model={name}"]).model
    assert config == ModelConfig(
        name=name, layers=layers, heads=heads, d_model=d_model, ffn=4 * d_model, layer_norm=layer_norm,
        embed_dim=width if width != d_model else 0, vocab_size=50272, positions=2048, dropout=0.1, init_std=0.006,
    )  # fmt: skip
