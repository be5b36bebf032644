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
    vocab_size: int = 50272
    positions: int = 2048
    """Longest sequence; the table has two rows more (OPT's offset)."""
    dropout: float = 0.1
    """On hidden states and attention; none on embeddings."""
    init_std: float = 0.006
