"""The weights of one of our checkpoints, tensor by tensor: a tensor may lie in pieces in the files
of several ranks."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opt_train.checkpoint import manifest
from opt_train.checkpoint.manifest import CheckpointError, Progress
from opt_train.exchange.safetensors_file import SUFFIX, read_header
from opt_train.exchange.stored import Stored
from opt_train.protocol.exits import BadInput

MODEL = "model."
"""What a checkpoint puts before a parameter's name (`checkpoint/tensors.py`)."""

PLACES = "DCP_SHARDING_INFO"
"""Where torch's writer says the offset of each piece in its tensor (torch.distributed.checkpoint,
`_hf_utils`)."""


@dataclass(frozen=True, slots=True)
class _Piece:
    offset: tuple[int, ...]
    stored: Stored


def weights_in(
    folder: Path, manifest_sha256: str | None, progress: Progress | None = None
) -> dict[str, Stored]:
    """The model's tensors by their Hugging Face names. Every byte of the checkpoint is verified
    first.

    Raises:
        BadInput: the checkpoint does not verify, or its pieces do not make whole tensors.
    """
    try:
        committed = manifest.verify(folder, manifest_sha256, progress)
    except CheckpointError as error:
        raise BadInput(f"{error}; give another checkpoint") from None
    pieces: dict[str, list[_Piece]] = {}
    for path in committed.files:
        if not path.endswith(SUFFIX):
            continue
        header = read_header(folder / path)
        places = _places(folder / path, header.metadata)
        for name, stored in header.tensors.items():
            if name.startswith(MODEL):
                offset = _offset(folder / path, places, name, len(stored.shape))
                pieces.setdefault(name.removeprefix(MODEL), []).append(_Piece(offset, stored))
    return {name: _whole(name, parts) for name, parts in pieces.items()}


def _places(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        places = json.loads(metadata.get(PLACES, "{}"))
    except (ValueError, RecursionError):
        places = None
    if not isinstance(places, dict):
        raise BadInput(
            f"{path} does not say which parts of its tensors it holds; give another checkpoint"
        )
    return places


def _offset(path: Path, places: Mapping[str, Any], name: str, dimensions: int) -> tuple[int, ...]:
    """Where in its tensor a piece begins; at the origin where the file says nothing of pieces."""
    if not places:
        return (0,) * dimensions
    try:
        offset = tuple(int(number) for number in places[name]["saved_offsets"])
    except (KeyError, TypeError, ValueError):
        offset = ()
    if len(offset) != dimensions or any(number < 0 for number in offset):
        raise BadInput(
            f"{path} does not say which part of tensor {name} it holds; give another checkpoint"
        )
    return offset


def _whole(name: str, parts: list[_Piece]) -> Stored:
    parts = [part for part in parts if math.prod(part.stored.shape)] or parts[:1]
    first = parts[0].stored
    ends = [[o + s for o, s in zip(part.offset, part.stored.shape, strict=True)] for part in parts]
    if any(
        len(end) != len(ends[0]) or part.stored.dtype != first.dtype
        for end, part in zip(ends, parts, strict=True)
    ):
        raise BadInput(
            f"the pieces of tensor {name} in {first.where.parent} do not fit; give another "
            "checkpoint"
        )
    shape = tuple(max(column) for column in zip(*ends, strict=True))
    if sum(math.prod(part.stored.shape) for part in parts) != math.prod(shape):
        raise BadInput(
            f"tensor {name} is incomplete in {first.where.parent}; give another checkpoint"
        )
    if len(parts) == 1:
        return first

    def read() -> torch.Tensor:
        tensor = torch.empty(shape, dtype=first.dtype)
        for part, end in zip(parts, ends, strict=True):
            box = tuple(slice(o, e) for o, e in zip(part.offset, end, strict=True))
            tensor[box].copy_(part.stored.read())
        return tensor

    # Cut into rows, as every layout but a tensor-parallel one cuts: one piece behind the other is
    # the tensor.
    by_rows = sorted(parts, key=lambda part: part.offset)
    if any(part.stored.shape[1:] != shape[1:] for part in parts):
        return Stored(first.where, shape, first.dtype, read)

    def pieces() -> Iterator[torch.Tensor]:
        for part in by_rows:
            assert part.stored.pieces is not None
            yield from part.stored.pieces()

    return Stored(first.where, shape, first.dtype, read, pieces)
