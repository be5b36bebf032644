"""How large a model is and what a token costs: arithmetic on a `ModelConfig`, standard library
only."""

from opt_train.model.config import ModelConfig

POSITION_OFFSET = 2
"""OPT's position table begins at row 2: rows 0 and 1 are never read (fairseq kept them for
padding)."""


LOGITS_AT_ONCE = 1 << 25
"""Logits that the loss has at a time: 128 MiB in fp32, twice."""


def tokens_at_once(vocabulary_rows: int) -> int:
    """Tokens whose logits over `vocabulary_rows` the loss has at a time; a multiple of 256, which
    suits GPUs' tiles."""
    tokens = max(1, LOGITS_AT_ONCE // vocabulary_rows)
    return tokens - tokens % 256 if tokens > 256 else tokens


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the decoder; the tied output embedding counts once (facts of arXiv 2205.01068,
    table 1)."""
    d, ffn, embedding = model.d_model, model.ffn, model.embedding_width
    attention = 4 * (d * d + d)
    feed_forward = (d * ffn + ffn) + (ffn * d + d)
    layer_norms = 2 * 2 * d
    embeddings = model.vocab_size * embedding + (model.positions + POSITION_OFFSET) * d
    projections = 2 * embedding * d if embedding != d else 0
    final_layer_norm = 2 * d if model.layer_norm == "pre" else 0
    return (
        model.layers * (attention + feed_forward + layer_norms)
        + embeddings
        + projections
        + final_layer_norm
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token: 6 N + 12 L d s (PaLM,
    appendix B).

    Recomputation is not counted, so this is the numerator of MFU. N is `parameter_count`: the token
    embedding, of whatever width, stands for the tied head's product with it, and each projection is
    a product itself.
    """
    return 6 * parameter_count(model) + 12 * model.layers * model.d_model * sequence_length
