"""A model's configuration as Hugging Face's `config.json` has it, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_train.data.tokenizer import EOS, PAD
from opt_train.model.config import ModelConfig
from opt_train.protocol.exits import BadInput

NAMES_OF_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

SAME_IN_ALL = {
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
    "_remove_final_layer_norm": False,
}
"""Switches of `OPTConfig` that no published OPT turns, and that our decoder does not have."""

# A limit against hostile files: no loop and no allocation may follow a number that nobody has
# checked.
LARGEST = 1 << 24
"""No size of a model is larger; the widest published OPT has 50,272."""


def to_hugging_face(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` of a model whose weights are stored as `dtype` (fp32, bf16 or fp16)."""
    return {
        "_name_or_path": model.name,
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.positions,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "hidden_size": model.d_model,
        "ffn_dim": model.ffn,
        "word_embed_proj_dim": model.embedding_width,
        "do_layer_norm_before": model.layer_norm == "pre",
        **SAME_IN_ALL,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": model.init_std,
        "use_cache": True,
        # As the published files have it: an OPT text begins with `</s>`, never with `<s>`.
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": NAMES_OF_TYPES[dtype],
    }


def generation() -> dict[str, Any]:
    """`generation_config.json`: a text begins and ends with `</s>`."""
    return {
        "_from_model_config": True,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def from_hugging_face(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes; what it leaves out is as `OPTConfig` has it.

    Raises:
        BadInput: it is no OPT model, or one that our decoder is not.
    """
    if values.get("model_type") != "opt":
        raise BadInput(
            f"{path} is of a model of type {values.get('model_type')!r}; only OPT models can be "
            "imported"
        )
    for key, only in SAME_IN_ALL.items():
        if (value := values.get(key, only)) != only:
            raise BadInput(
                f"{path} has {key}={value!r}, which this program's OPT does not have; only "
                f"{only!r} works"
            )
    width = _size(path, values, "hidden_size", 768)
    narrow = width
    if values.get("word_embed_proj_dim"):
        narrow = _size(path, values, "word_embed_proj_dim", width)
    # False in the released OPT-350M alone, the one that also narrows its embedding (512 to 1024).
    before = values.get("do_layer_norm_before", True)
    if not isinstance(before, bool):
        raise BadInput(
            f"{path} has do_layer_norm_before={before!r}, which is neither true nor false; mend it"
        )
    heads = _size(path, values, "num_attention_heads", 12)
    if width % heads:
        raise BadInput(
            f"{path} has num_attention_heads={heads}, which does not divide hidden_size={width}; "
            "mend it"
        )
    return ModelConfig(
        name=_name(values.get("_name_or_path"), path),
        layers=_size(path, values, "num_hidden_layers", 12),
        heads=heads,
        d_model=width,
        ffn=_size(path, values, "ffn_dim", 3072),
        layer_norm="pre" if before else "post",
        embed_dim=0 if narrow == width else narrow,
        vocab_size=_size(path, values, "vocab_size", 50272),
        positions=_size(path, values, "max_position_embeddings", 2048),
        dropout=_share(path, values, "dropout", 0.1),
        # Hugging Face's default, not the paper's 0.006: the file is read as its own class reads it.
        init_std=_share(path, values, "init_std", 0.02),
    )


def _name(given: object, path: Path) -> str:
    """A word for people: the last part of what the file calls itself, or its folder's name."""
    word = given.rpartition("/")[2] if isinstance(given, str) else ""
    # It is shown on terminals: a file of somebody's brings no escape sequences with it.
    return word[:80] if word and word.isprintable() else path.resolve().parent.name


def _size(path: Path, values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise BadInput(f"{path} has {key}={str(value)[:40]}, which is no size of a model; mend it")
    return value


def _share(path: Path, values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise BadInput(
            f"{path} has {key}={str(value)[:40]}, which does not lie between 0 and 1; mend it"
        )
    return float(value)
