"""Writing a safetensors file tensor by tensor, straight from the tensors' memory; and the header of
one, read strictly.

The library's own `save` makes the whole file in memory first, in which a checkpoint of a rank spent
most of its time. The format (github.com/huggingface/safetensors): the header's length in 8 bytes,
little-endian; the header, JSON, padded with spaces; the tensors' bytes, one behind the other.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

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

LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""

_OFFSETS, _OFFSETS_OF_ONE = "DCP_SHARDING_INFO", "saved_offsets"
"""torch's names (torch.distributed.checkpoint._hf_utils)."""

_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 8


class Damaged(ValueError):
    """Not a whole safetensors file; the message says why, and names the tensor but not the file."""


class UnknownType(Damaged):
    """The file may be whole, but a tensor of it is of a type that is not read here."""

    def __init__(self, tensor: str, type_name: object) -> None:
        super().__init__(f"tensor {tensor} has type {type_name!r:.40}, which is not known here")
        self.tensor = tensor
        self.type_name = str(type_name)[:40]


@dataclass(frozen=True, slots=True)
class Place:
    """Type and shape of a tensor in a file, and its bytes: those from `begin` to before `end`, of
    the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself; every byte behind the header belongs to one of `tensors`, and
    none to two."""

    tensors: Mapping[str, Place]
    metadata: Mapping[str, str]


class ByteSink(Protocol):
    """What a file is written to: a file, or its stand-in in memory."""

    def write(self, content: memoryview | bytes, /) -> int | None:
        """Take all of `content`."""
        ...


def write_safetensors(
    sink: ByteSink, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write `tensors`, which lie on the CPU. The same tensors give the same bytes.

    Raises:
        KeyError: the format has no name for a tensor's type.
    """
    # The widest first, so that each begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sink.write(
        header_of(((name, tensors[name].dtype, tensors[name].shape) for name in names), metadata)
    )
    for name in names:
        if tensors[name].numel():
            sink.write(bytes_of(tensors[name]))


def sharding_metadata(offsets: Mapping[str, Iterable[int]]) -> dict[str, str]:
    """What torch's reader looks for: where in the whole each tensor of a file begins."""
    places = {name: {_OFFSETS_OF_ONE: list(begins)} for name, begins in sorted(offsets.items())}
    return {_OFFSETS: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}


def header_of(
    tensors: Iterable[tuple[str, torch.dtype, Iterable[int]]], metadata: Mapping[str, str]
) -> bytes:
    """What stands before the bytes of `tensors`: (name, type, shape), in the order in which their
    bytes will follow.

    Raises:
        KeyError: the format has no name for a tensor's type.
    """
    header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))}
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


class PartReader:
    """Reads parts of tensors from one file after another, straight into where they belong if that
    is plain memory."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)  # one for all: memory that is new is slow

    def read(
        self,
        file: io.FileIO,
        place: Place,
        target: Tensor,
        offsets: Sequence[int] = (),
        lengths: Sequence[int] = (),
    ) -> None:
        """Fill `target` with the part of a tensor of the file that begins at `offsets`; without
        them with all of it.

        Raises:
            Damaged: the file ends too early.
            OSError: it cannot be read.
        """
        shape, width = place.shape, place.dtype.itemsize
        offsets, lengths = offsets or [0] * len(shape), lengths or shape
        inner = math.prod(shape[1:]) * width
        if list(lengths[1:]) != list(shape[1:]):  # not one piece: read the rows, and take from them
            rows = self._rows(file, place, offsets[0], lengths[0], inner)
            taken = tuple(
                slice(begin, begin + length)
                for begin, length in zip(offsets[1:], lengths[1:], strict=True)
            )
            target.copy_(rows[(slice(None), *taken)])
        elif target.device.type == "cpu" and target.is_contiguous() and target.dtype == place.dtype:
            begin = place.begin + (offsets[0] * inner if shape else 0)
            _fill(file, begin, target.reshape(-1).view(torch.uint8))
        else:
            rows = self._rows(file, place, *((offsets[0], lengths[0]) if shape else (0, 1)), inner)
            target.copy_(rows.view(target.shape))

    def _rows(self, file: io.FileIO, place: Place, first: int, count: int, inner: int) -> Tensor:
        size = count * inner
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        content = self._buffer[:size]
        _fill(file, place.begin + first * inner, content)
        return content.view(place.dtype).view(count, *place.shape[1:])


def _fill(file: io.FileIO, begin: int, content: Tensor) -> None:
    view = content.numpy().data
    file.seek(begin)
    while view:  # the system gives 2 GB at a time at most
        if not (count := file.readinto(view)):
            raise Damaged("it has become shorter while it was read")
        view = view[count:]


def read_header(file: BinaryIO) -> Header:
    """The header of a file opened at its beginning, compared with the file's size.

    Raises:
        Damaged: the file is cut, or is not what the format allows.
        OSError: it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    # The length is compared before anything of that length is read: eight forged bytes would
    # otherwise ask for 16 exbibytes of memory.
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise Damaged(f"its header is {length} bytes long and the file {size}")
    try:
        payload = json.loads(file.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # deep nesting, or a number of 5000 digits
        raise Damaged(f"its header is no JSON: {str(error)[:80]}") from None
    if not isinstance(payload, dict):
        raise Damaged("its header is no JSON object")
    metadata = payload.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise Damaged(f"{_METADATA} of its header does not hold texts")
    places = {name: _place(name, entry, 8 + length) for name, entry in payload.items()}
    # As the format's own library: every byte belongs to one tensor, and none to two, so nothing can
    # hide in a gap and no tensor can be made to look into another.
    end = 8 + length
    for place, name in sorted((((place.begin, place.end), name) for name, place in places.items())):
        if place[0] != end:
            why = f"begins at byte {place[0]}, where {end} is the end of the one before"
            # One that was moved out of the file leaves a gap, at which another one shows first.
            for other, beyond in places.items():
                if beyond.end > size:
                    why += f"; {other} lies at bytes {beyond.begin} to {beyond.end} of {size}"
                    break
            raise Damaged(f"tensor {name} {why}")
        end = place[1]
    if end != size:
        raise Damaged(f"its tensors end at byte {end} and the file at {size}")
    return Header(places, metadata)


def offsets_in(header: Header) -> Mapping[str, tuple[int, ...]]:
    """Where each tensor of the file begins in the whole. One that says nothing of parts has all of
    each, as imports do.

    Raises:
        Damaged: what it says does not read.
    """
    if _OFFSETS not in header.metadata:
        return {name: (0,) * len(place.shape) for name, place in header.tensors.items()}
    try:
        entries = json.loads(header.metadata[_OFFSETS])
        offsets = {
            name: tuple(int(offset) for offset in entries[name][_OFFSETS_OF_ONE])
            for name in header.tensors
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"it does not say where its tensors belong: {error!r:.80}") from None
    for name, begins in offsets.items():
        if len(begins) != len(header.tensors[name].shape) or any(begin < 0 for begin in begins):
            raise Damaged(
                f"tensor {name} of shape {list(header.tensors[name].shape)} cannot begin at "
                f"{list(begins)}"
            )
    return offsets


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice: which of two is meant depends on the reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _place(name: str, entry: Any, first: int) -> Place:
    """Where a tensor's bytes are, checked against its shape and type; those of all begin at
    `first`."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"the header does not say type, shape and place of tensor {name}") from None
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise UnknownType(name, dtype)
    if not isinstance(shape, list) or not all(
        type(number) is int and number >= 0 for number in (*shape, begin, end)
    ):
        raise Damaged(f"shape or place of tensor {name} are no whole numbers")
    # Python's integers do not overflow: a forged shape of 2^62 by 2^62 is compared as it is, and
    # nothing is allocated by it.
    if math.prod(shape) * _TYPES[dtype].itemsize != end - begin:
        raise Damaged(f"tensor {name} has shape {shape} and {end - begin} bytes, which do not fit")
    return Place(_TYPES[dtype], tuple(shape), first + begin, first + end)
