"""A tensor that lies in somebody's file, and what must hold of it before it is read."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from opt_train.model.config import ModelConfig
from opt_train.model.sizes import POSITION_OFFSET
from opt_train.protocol.exits import BadInput

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The types that weights may have, as `precision` calls them."""

TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}

CHUNK = 1 << 22
"""Elements that are checked, converted and written at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file's header says of a tensor, and how to get it."""

    where: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """The whole tensor, in memory that nobody else changes; raises BadInput where the file is too
    short."""
    pieces: Callable[[], Iterator[torch.Tensor]] | None = None
    """The elements in order, at most `CHUNK` at a time, where the file allows it: less memory than
    `read`."""


def shapes_of(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of `OPT(model)` by its name, which is Hugging Face's, and its shape; in the
    model's order."""
    d, width, decoder = model.d_model, model.embedding_width, "model.decoder."
    yield decoder + "embed_tokens.weight", (model.vocab_size, width)
    yield decoder + "embed_positions.weight", (model.positions + POSITION_OFFSET, d)
    if width != d:
        yield decoder + "project_in.weight", (d, width)
        yield decoder + "project_out.weight", (width, d)
    for number in range(model.layers):
        for name, shape in _layer(model):
            yield f"{decoder}layers.{number}.{name}", shape
    if model.layer_norm == "pre":
        yield decoder + "final_layer_norm.weight", (d,)
        yield decoder + "final_layer_norm.bias", (d,)


def _layer(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, ffn = model.d_model, model.ffn
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield f"self_attn.{name}.weight", (d, d)
        yield f"self_attn.{name}.bias", (d,)
    for name, (rows, columns) in (("fc1", (ffn, d)), ("fc2", (d, ffn))):
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        yield f"{name}.weight", (d,)
        yield f"{name}.bias", (d,)


def check_complete(source: Path, stored: Mapping[str, StoredTensor], model: ModelConfig) -> None:
    """Compare names, shapes and types with those that `model` has.

    Raises:
        BadInput: a tensor is missing, unexpected, or of another shape or type; the first such is
            named.
    """
    wanted = set()
    for name, shape in shapes_of(
        model
    ):  # ends at the first that is missing, whatever number of layers a file claims
        if name not in stored:
            raise BadInput(
                f"tensor {name} is missing in {source}; get the whole of it, or name the right "
                "model"
            )
        wanted.add(name)
        there = stored[name]
        if there.shape != shape:
            raise BadInput(
                f"tensor {name} has shape {list(there.shape)} in {there.where} and {list(shape)} "
                "in the model; "
                "give the weights of this model"
            )
        if there.dtype not in TYPE_NAMES:
            raise BadInput(
                f"tensor {name} of {there.where} has type {there.dtype}; give it in fp32, bf16 or "
                "fp16"
            )
    for name, there in stored.items():
        if name not in wanted:
            raise BadInput(
                f"tensor {name} of {there.where} belongs to no part of the model; give an OPT "
                "model's weights"
            )


def chunks_of(name: str, stored: StoredTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The elements of a tensor in order and converted to `dtype`, some at a time; each is finite.

    Raises:
        BadInput: one is not, in the file or in the other type.
    """
    for piece in (
        stored.pieces()
        if stored.pieces is not None
        else torch.split(stored.read().reshape(-1), CHUNK)
    ):
        converted = piece.to(dtype)
        if not torch.isfinite(converted).all():
            # fp16 ends at 65,504; bf16 has the range of fp32.
            if torch.isfinite(piece).all():
                raise BadInput(
                    f"tensor {name} of {stored.where} has numbers too large for "
                    f"{TYPE_NAMES[dtype]}; use --dtype bf16"
                )
            raise BadInput(
                f"tensor {name} of {stored.where} has a number that is not finite; give healthy "
                "weights"
            )
        yield converted


def bytes_in(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
