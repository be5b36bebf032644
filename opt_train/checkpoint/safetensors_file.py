"""Writing a safetensors file tensor by tensor, straight from the tensors' memory.

The library's own `save` makes the whole file in memory first, in which a checkpoint of a rank spent most of its time.
The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the header, JSON, padded
with spaces; the tensors' bytes, one behind the other.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names."""

_ALIGNMENT = 8


class Sink(Protocol):
    """What is written to."""

    def write(self, content: memoryview | bytes, /) -> int | None:
        """Take all of `content`."""
        ...


def write_safetensors(sink: Sink, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, which lie on the CPU. The same tensors give the same bytes.

    Raises:
        KeyError: the format has no name for a tensor's type.
    """
    # The widest first, so that each begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sink.write(header_of(((name, tensors[name].dtype, tensors[name].shape) for name in names), metadata))
    for name in names:
        if tensors[name].numel():
            sink.write(bytes_of(tensors[name]))


def header_of(tensors: Iterable[tuple[str, torch.dtype, Iterable[int]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of `tensors`: (name, type, shape), in the order in which their bytes will follow.

    Raises:
        KeyError: the format has no name for a tensor's type.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, dtype, sizes in tensors:
        shape = list(sizes)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes: its own memory where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
