"""What a model is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The OPT decoder (arXiv 2205.01068, table 1)."""

    name: str = "opt-125m"
    layers: int = 12
    heads: int = 12
    d_model: int = 768
    ffn: int = 3072
    layer_norm: str = "pre"
    """``pre``: before attention and feed-forward network, and a final one; ``post``: behind each
    residual, no final one, as in the released OPT-350M."""
    embed_dim: int = 0
    """Width of the token embedding and so of the tied head; another one than `d_model` is projected
    to it and back (OPT-350M: 512). 0: `d_model`."""
    vocab_size: int = 50272
    positions: int = 2048
    """Longest sequence; the table has two rows more (OPT's offset)."""
    dropout: float = 0.1
    """On hidden states and attention; none on embeddings."""
    init_std: float = 0.006

    @property
    def embedding_width(self) -> int:
        """Columns of the token embedding."""
        return self.embed_dim or self.d_model
