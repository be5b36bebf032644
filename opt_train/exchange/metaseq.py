"""metaseq's consolidated checkpoint: one file with the whole decoder, as the published OPT files
are.

What differs from Hugging Face's names: no `model.` in front; keys, values and queries in one
matrix, in this order; `layer_norm` for the last LayerNorm, `project_in_dim` and `project_out_dim`;
a copy of the embedding as the head. The position table has the same two rows in front. Such a file
often does not say its number of heads.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opt_train.exchange.stored_tensor import StoredTensor
from opt_train.model.config import ModelConfig
from opt_train.model.sizes import POSITION_OFFSET
from opt_train.protocol.exits import BadInput

RENAMED = {
    "project_in_dim.weight": "project_in.weight",
    "project_out_dim.weight": "project_out.weight",
    "layer_norm.weight": "final_layer_norm.weight",
    "layer_norm.bias": "final_layer_norm.bias",
}
FUSED = ("k_proj", "v_proj", "q_proj")
"""The order inside `qkv_proj`, whatever its name says."""

# A buffer of fairseq's decoders with the version of their format; it is no weight.
LEFT_OUT = ("version",)
HEAD = "output_projection.weight"
VOCABULARY_MULTIPLE = 8
"""metaseq pads its vocabulary with rows that no token has until this divides it."""


def model_and_tensors(
    path: Path, loaded: Any, preset: ModelConfig | None
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The model in a loaded file, and its tensors by Hugging Face's names.

    Args:
        preset: the model it is said to be; None: the file must tell its number of heads.

    Raises:
        BadInput: the file holds no such decoder, or another one than `preset`.
    """
    if not isinstance(loaded, Mapping):
        raise BadInput(f"{path} holds no tensors by name; give metaseq's consolidated file")
    weights = loaded["model"] if isinstance(loaded.get("model"), Mapping) else loaded
    tensors = _renamed(path, weights)
    model = _model(path, loaded, tensors, preset)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    if model.vocab_size > embedding.shape[0]:
        tensors["model.decoder.embed_tokens.weight"] = _padded(embedding, model.vocab_size)
    return model, tensors


def _renamed(path: Path, weights: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    head = None
    for raw, value in weights.items():
        name = raw.removeprefix("decoder.") if isinstance(raw, str) else ""
        if name in LEFT_OUT:
            continue
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or name == raw:
            raise BadInput(
                f"{path} holds {str(raw)[:80]!r}, which is no tensor of metaseq's decoder; give "
                "its consolidated file, "
                "or Hugging Face's whole folder"
            )
        if name == HEAD:
            head = value
            continue
        if ".qkv_proj." not in name:
            name = RENAMED.get(name, name)
            tensors[f"model.decoder.{name}"] = StoredTensor(
                path, tuple(value.shape), value.dtype, value.detach
            )
            continue
        if not value.ndim or value.shape[0] % len(FUSED):
            raise BadInput(
                f"tensor {raw} of {path} has shape {list(value.shape)}, which is no k, v and q; "
                "get it again"
            )
        for part, piece in zip(FUSED, value.detach().chunk(len(FUSED)), strict=True):
            new = f"model.decoder.{name.replace('qkv_proj', part)}"
            tensors[new] = StoredTensor(path, tuple(piece.shape), piece.dtype, _given(piece))
    embedding = weights.get("decoder.embed_tokens.weight")
    if (
        head is not None
        and isinstance(embedding, torch.Tensor)
        and not torch.equal(head, embedding)
    ):
        raise BadInput(
            f"tensor decoder.{HEAD} of {path} is not the token embedding; only models with a tied "
            "head work"
        )
    return tensors


def _given(piece: torch.Tensor) -> Callable[[], torch.Tensor]:
    # A lambda in the loop itself would see its variable, and each read would give the last piece.
    return lambda: piece


def _padded(embedding: StoredTensor, rows: int) -> StoredTensor:
    """The embedding with rows of zeros behind its own."""

    def read() -> torch.Tensor:
        tensor = torch.zeros(rows, embedding.shape[1], dtype=embedding.dtype)
        tensor[: embedding.shape[0]] = embedding.read()
        return tensor

    return StoredTensor(embedding.where, (rows, embedding.shape[1]), embedding.dtype, read)


def _model(
    path: Path,
    loaded: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    preset: ModelConfig | None,
) -> ModelConfig:
    """What the tensors' shapes tell, and for the rest the preset or the file's own arguments."""

    def size(name: str, dimension: int) -> int:
        stored = tensors.get(f"model.decoder.{name}.weight")
        if stored is None or len(stored.shape) != 2:
            raise BadInput(
                f"tensor decoder.{name}.weight is missing in {path}; give metaseq's consolidated "
                "file"
            )
        return stored.shape[dimension]

    rows, width, d_model = (
        size("embed_tokens", 0),
        size("embed_tokens", 1),
        size("embed_positions", 1),
    )
    numbers = [name.split(".")[3] for name in tensors if name.startswith("model.decoder.layers.")]
    described = preset
    if described is None:
        described = ModelConfig(name=path.stem, heads=_heads(path, loaded), dropout=0.1)
    layers = len({number for number in numbers if number.isdecimal()})
    model = replace(
        described,
        layers=layers,
        d_model=d_model,
        ffn=size("layers.0.fc1", 0),
        layer_norm="pre" if "model.decoder.final_layer_norm.weight" in tensors else "post",
        embed_dim=0 if width == d_model else width,
        vocab_size=rows,
        positions=size("embed_positions", 0) - POSITION_OFFSET,
    )
    if preset is not None:
        model = _as_preset(path, model, preset)
    if d_model % model.heads or not layers:
        raise BadInput(
            f"{path} has {layers} layers of width {d_model}, which {model.heads} heads do not "
            "fit; name --model"
        )
    return model


def _as_preset(path: Path, model: ModelConfig, preset: ModelConfig) -> ModelConfig:
    """The model that was found, with the rows of its vocabulary that the preset has more for
    padding.

    Raises:
        BadInput: it is another one.
    """
    rows = model.vocab_size
    if rows <= preset.vocab_size < rows + VOCABULARY_MULTIPLE:  # not padded yet
        model = replace(model, vocab_size=preset.vocab_size)
    for key in (
        "layers",
        "d_model",
        "ffn",
        "layer_norm",
        "embedding_width",
        "vocab_size",
        "positions",
    ):
        if (found := getattr(model, key)) != (wanted := getattr(preset, key)):
            raise BadInput(
                f"{path} has {key}={found} where --model={preset.name} has {wanted}; name the "
                "right model"
            )
    return model


def _heads(path: Path, loaded: Mapping[str, Any]) -> int:
    """Heads, where the file carries the arguments it was trained with."""
    # The shapes do not tell it: projections are d_model by d_model for any number of heads. Older
    # files have argparse's record under `args`, newer ones a mapping under `cfg`.
    for record in (loaded.get("args"), loaded.get("cfg")):
        values = _values(record)
        for inner in (values, _values(values.get("model"))):
            heads = inner.get("decoder_attention_heads")
            if type(heads) is int and heads > 0:
                return heads
    raise BadInput(f"{path} does not tell its number of heads; name the model, as --model opt-125m")


def _values(record: object) -> Mapping[str, Any]:
    if isinstance(record, argparse.Namespace):
        return vars(record)
    return record if isinstance(record, Mapping) else {}
