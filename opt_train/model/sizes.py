"""How large a model is and what a token costs: arithmetic on a `ModelConfig`, standard library only."""

from opt_train.model.config import ModelConfig

POSITION_OFFSET = 2
"""OPT's position table begins at row 2: rows 0 and 1 are never read (fairseq kept them for padding)."""


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the decoder; the tied output embedding counts once (facts of arXiv 2205.01068, table 1)."""
    d, ffn = model.d_model, model.ffn
    attention = 4 * (d * d + d)
    feed_forward = (d * ffn + ffn) + (ffn * d + d)
    layer_norms = 2 * 2 * d
    embeddings = (model.vocab_size + model.positions + POSITION_OFFSET) * d
    return model.layers * (attention + feed_forward + layer_norms) + embeddings + 2 * d


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token: 6 N + 12 L d s (PaLM, appendix B).

    Recomputation is not counted, so this is the numerator of MFU.
    """
    return 6 * parameter_count(model) + 12 * model.layers * model.d_model * sequence_length
