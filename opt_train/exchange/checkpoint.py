"""The weights of one of our checkpoints, tensor by tensor: a tensor may lie in pieces in the files
of several ranks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from opt_train.checkpoint import manifest
from opt_train.checkpoint.manifest import CheckpointError, ReportProgress
from opt_train.checkpoint.safetensors_file import Damaged, offsets_in
from opt_train.exchange.safetensors_file import SUFFIX, open_safetensors
from opt_train.exchange.stored_tensor import StoredTensor
from opt_train.protocol.exits import BadInput

MODEL = "model."
"""What a checkpoint puts before a parameter's name (`checkpoint/tensors.py`)."""


@dataclass(frozen=True, slots=True)
class _Piece:
    offset: tuple[int, ...]
    stored: StoredTensor


def weights_in(
    folder: Path, manifest_sha256: str | None, progress: ReportProgress | None = None
) -> dict[str, StoredTensor]:
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
        header, tensors = open_safetensors(folder / path)
        try:
            offsets = offsets_in(header)
        except Damaged as error:
            raise BadInput(f"{folder / path}: {error}; give another checkpoint") from None
        for name, stored in tensors.items():
            if name.startswith(MODEL):
                piece = _Piece(offsets[name], stored)
                pieces.setdefault(name.removeprefix(MODEL), []).append(piece)
    return {name: _whole(name, parts) for name, parts in pieces.items()}


def _whole(name: str, parts: list[_Piece]) -> StoredTensor:
    # Equal chunks of rows leave the last ranks empty pieces, as of 3 rows over 4 ranks; one is kept
    # where the tensor itself is empty.
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
    # The ends alone would not show that a piece is missing from the middle.
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
        return StoredTensor(first.where, shape, first.dtype, read)

    def pieces() -> Iterator[torch.Tensor]:
        for part in by_rows:
            assert part.stored.pieces is not None
            yield from part.stored.pieces()

    return StoredTensor(first.where, shape, first.dtype, read, pieces)
