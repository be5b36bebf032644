"""safetensors files read and written tensor by tensor: 8 bytes of length, a JSON header, then the
bytes.

The header is known ahead, so a file of any size is written while one tensor is in memory. What is
read is checked as the format's own library does (huggingface/safetensors): every byte belongs to
one tensor, and none to two.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opt_train.checkpoint import safetensors_file
from opt_train.checkpoint.manifest import naming
from opt_train.exchange.stored import CHUNK, Stored, bytes_in, chunks_of
from opt_train.protocol.exits import BadInput

SUFFIX = ".safetensors"
LONGEST_HEADER = 100_000_000
"""The format's own limit."""

METADATA = "__metadata__"

DTYPES = {name: dtype for dtype, name in safetensors_file.DTYPES.items()}

Progress = Callable[[int], None]
"""Told bytes that were written, after each piece."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a file, compared with the file's size.

    Raises:
        BadInput: the file cannot be read, is cut or is not what the format allows.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise _damaged(path, f"its header is {length} bytes long and the file {size}")
            content = file.read(length)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; mend it and try again") from None
    try:
        payload = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {str(error)[:80]}") from None
    if not isinstance(payload, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = payload.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged(path, f"{METADATA} of its header does not hold texts")
    first = 8 + length
    spans = sorted(
        (*_span(path, name, entry, size - first), name) for name, entry in payload.items()
    )
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise _damaged(
                path,
                f"tensor {name} begins at byte {begin}, where {end} is the end of the one before",
            )
        end = stop
    if end != size - first:
        raise _damaged(path, f"its tensors have {end} bytes and the file holds {size - first}")
    tensors = {name: _stored(path, payload[name], first) for name in payload}
    return Header(tensors, metadata)


def write(
    path: Path,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype,
    *,
    named: Callable[[str], str] = str,
    progress: Progress | None = None,
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
    header = safetensors_file.header_of(described, {"format": "pt"})
    size = len(header) + sum(bytes_in(stored.shape, dtype) for stored in tensors.values())
    digest = hashlib.sha256(header)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice: which of two is meant depends on the reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _span(path: Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    """Where a tensor's bytes begin and end in the data, checked against its shape and type."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(
            path, f"the header does not say type, shape and place of tensor {name}"
        ) from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadInput(f"tensor {name} of {path} has type {dtype}; give it in fp32, bf16 or fp16")
    if not isinstance(shape, list) or not all(
        type(number) is int and number >= 0 for number in (*shape, begin, end)
    ):
        raise _damaged(path, f"shape or place of tensor {name} are no whole numbers")
    if not begin <= end <= size:
        raise _damaged(path, f"tensor {name} lies at bytes {begin} to {end} of {size}")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise _damaged(
            path, f"tensor {name} has shape {shape} and {end - begin} bytes, which do not fit"
        )
    return begin, end


def _stored(path: Path, entry: Mapping[str, Any], first: int) -> Stored:
    shape, dtype, begin = (
        tuple(entry["shape"]),
        DTYPES[entry["dtype"]],
        first + entry["data_offsets"][0],
    )
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

    return Stored(path, shape, dtype, lambda: read_some(0, size).view(shape), pieces)


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} is no whole safetensors file ({why}); get it again")
