"""What a model is."""

from dataclasses import dataclass
from typing import Annotated

from opt_train.protocol.keys import BELOW_ONE, FIXED, NOT_NEGATIVE, POSITIVE, TRAINING, Choices


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The OPT decoder (arXiv 2205.01068, table 1)."""

    name: Annotated[str, TRAINING] = "opt-125m"
    layers: Annotated[int, POSITIVE, FIXED] = 12
    heads: Annotated[int, POSITIVE, FIXED] = 12
    d_model: Annotated[int, POSITIVE, FIXED] = 768
    ffn: Annotated[int, POSITIVE, FIXED] = 3072
    layer_norm: Annotated[str, Choices("pre", "post"), FIXED] = "pre"
    """``pre``: before attention and feed-forward network, and a final one; ``post``: behind each
    residual, no final one, as in the released OPT-350M."""
    embed_dim: Annotated[int, NOT_NEGATIVE, FIXED] = 0
    """Width of the token embedding and so of the tied head; another one than `d_model` is projected
    to it and back (OPT-350M: 512). 0: `d_model`."""
    vocab_size: Annotated[int, POSITIVE, FIXED] = 50272
    """Rows of the token table: OPT's 50,265 entries, padded."""
    positions: Annotated[int, POSITIVE, FIXED] = 2048
    """Longest sequence; the table has two rows more (OPT's offset)."""
    dropout: Annotated[float, BELOW_ONE, TRAINING] = 0.1
    """On hidden states and attention; none on embeddings."""
    init_std: Annotated[float, POSITIVE, TRAINING] = 0.006

    @property
    def embedding_width(self) -> int:
        """Columns of the token embedding."""
        return self.embed_dim or self.d_model
