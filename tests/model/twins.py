"""Our decoder and Hugging Face's independent implementation of OPT, with the same weights."""

from dataclasses import replace

import torch
from transformers import OPTConfig, OPTForCausalLM

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise

TINY = ModelConfig(
    name="tiny", layers=2, heads=4, d_model=64, ffn=160, vocab_size=512, positions=64, dropout=0.0
)

VARIANTS = {
    "pre": TINY,
    "one head": replace(TINY, heads=1),
    "post": replace(TINY, layer_norm="post"),
    "projected": replace(TINY, embed_dim=32),
    "post and projected": replace(TINY, layer_norm="post", embed_dim=96),
    "wide": replace(TINY, d_model=256, heads=8, ffn=1024),
    "wide, post and projected": replace(
        TINY, d_model=256, heads=16, ffn=1024, layer_norm="post", embed_dim=128
    ),
}


def hugging_face(config: ModelConfig) -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            word_embed_proj_dim=config.embedding_width,
            do_layer_norm_before=config.layer_norm == "pre",
            num_hidden_layers=config.layers,
            ffn_dim=config.ffn,
            num_attention_heads=config.heads,
            max_position_embeddings=config.positions,
            dropout=0.0,
            attention_dropout=0.0,
        )
    ).float()


def twins(config: ModelConfig, std: float = 0.1) -> tuple[OPT, OPTForCausalLM]:
    """Ours and theirs; the weights are large enough that every path shows in the output."""
    ours, theirs = OPT(config), hugging_face(config)
    initialise(ours, replace(config, init_std=std), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return ours.eval(), theirs.eval()
