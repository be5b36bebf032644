"""Somebody's safetensors files as tensors that are not read yet, and such a file written tensor by
tensor.

The header is known ahead, so a file of any size is written while one tensor is in memory. The
format itself, and what a header must not say, is `checkpoint/safetensors_file.py`.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from opt_train.checkpoint.durable_file import naming
from opt_train.checkpoint.safetensors_file import (
    Damaged,
    Header,
    Place,
    UnknownType,
    header_of,
    read_header,
)
from opt_train.exchange.stored_tensor import CHUNK, StoredTensor, bytes_in, chunks_of
from opt_train.protocol.exits import BadInput

SUFFIX = ".safetensors"

CountBytes = Callable[[int], None]
"""Called with the bytes that were written, after each piece."""


def open_safetensors(path: Path) -> tuple[Header, dict[str, StoredTensor]]:
    """The header of a file, and its tensors by name, none of them read yet.

    Raises:
        BadInput: the file cannot be read, is cut or is not what the format allows.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; mend it and try again") from None
    except UnknownType as error:
        raise BadInput(
            f"tensor {error.tensor} of {path} has type {error.type_name}; give it in fp32, bf16 or "
            "fp16"
        ) from None
    except Damaged as error:
        raise _damaged(path, str(error)) from None
    return header, {name: _stored(path, place) for name, place in header.tensors.items()}


def write(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    *,
    named: Callable[[str], str] = str,
    progress: CountBytes | None = None,
) -> tuple[int, str]:
    """Write a new file durably; one tensor at a time is in memory. Returns its size and sha256.

    Args:
        dtype: of every tensor in the file.
        named: what a tensor is called in the file.

    Raises:
        BadInput: a number is not finite, or a source is cut.
        OSError: the file system does not allow it.
    """
    described = ((named(name), dtype, stored.shape) for name, stored in tensors.items())
    header = header_of(described, {"format": "pt"})
    size = len(header) + sum(bytes_in(stored.shape, dtype) for stored in tensors.values())
    digest = hashlib.sha256(header)
    # x: never over another file. Hashed as it is written, since reading it back would mean all
    # bytes once more.
    with naming(path), path.open("xb") as file:
        file.write(header)
        for name, stored in tensors.items():
            for chunk in chunks_of(name, stored, dtype):
                view = chunk.contiguous().view(torch.uint8).numpy().data
                file.write(view)
                digest.update(view)
                if progress is not None:
                    progress(len(view))
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _stored(path: Path, place: Place) -> StoredTensor:
    shape, dtype, begin = place.shape, place.dtype, place.begin
    size = math.prod(shape)

    def read_some(first_element: int, count: int) -> torch.Tensor:
        tensor = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        with naming(path), path.open("rb") as file:
            file.seek(begin + first_element * dtype.itemsize)
            if file.readinto(tensor.numpy().data) != tensor.numel():
                raise _damaged(path, "it has become shorter while it was read")
        return tensor.view(dtype)

    def pieces() -> Iterator[torch.Tensor]:
        for first_element in range(0, size, CHUNK):
            yield read_some(first_element, min(CHUNK, size - first_element))

    return StoredTensor(path, shape, dtype, lambda: read_some(0, size).view(shape), pieces)


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} is no whole safetensors file ({why}); get it again")
