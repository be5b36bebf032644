"""From shards into what trains or evaluates: all of a checkpoint on any layout, or a rank's own
file of a snapshot.

Each rank reads what it needs and asks nobody. torch's reader does the same with one planner for all
ranks, which took a quarter of a second for 1.5 GB, and with memory maps, which gave half of what
the disk does.
"""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opt_train.checkpoint.all_or_none import all_or_none
from opt_train.checkpoint.manifest import CheckpointError
from opt_train.checkpoint.parts import OwnPart, own_parts
from opt_train.checkpoint.safetensors_file import (
    Damaged,
    PartReader,
    Place,
    offsets_in,
    read_header,
)
from opt_train.checkpoint.tensors import OPTIMIZER, Restorable


class StoredPart(NamedTuple):
    """A part of a tensor in a file, and where in the whole it begins."""

    path: Path
    place: Place
    offsets: tuple[int, ...]


class WantedPart(NamedTuple):
    """What of a stored part is to be read, and into what; `offsets` count from the stored part's
    beginning."""

    place: Place
    target: Tensor
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def load(
    into: Restorable,
    folder: Path,
    process_group: dist.ProcessGroup | None = None,
    *,
    convert: bool = False,
) -> None:
    """Restore from all shards in `folder`, whoever wrote them. Called by all ranks of
    `process_group` together.

    Nothing is verified here: see `restore`. If anything is wrong, what it went into must not be
    used.

    Args:
        into: without optimizer state the weights alone are restored.
        convert: take tensors of another type too.

    Raises:
        CheckpointError: a shard is damaged, or a tensor is missing, unexpected, incomplete, of
            another shape, or of another type without `convert`. On every rank.
    """
    failure = f"{folder} cannot be restored"
    tensors = into.tensors()
    stored: dict[str, list[StoredPart]] = {}

    def look() -> None:
        stored.update(_stored_in(sorted(folder.glob("*.safetensors"))))
        _check_whole(tensors, stored, convert)

    all_or_none(look, process_group, failure)
    all_or_none(lambda: _read(_wanted(own_parts(tensors), stored)), process_group, failure)
    all_or_none(lambda: into.put_back(tensors), process_group, failure)


def load_own(into: Restorable, file: Path, process_group: dist.ProcessGroup | None = None) -> None:
    """Restore this rank from its own file of a snapshot alone. Called by all ranks of
    `process_group` together.

    Nobody's bytes are verified here: see `restore`. If anything is wrong, what it went into must
    not be used.

    Raises:
        CheckpointError: the file is damaged, or a tensor is missing, unexpected, or of another
            shape, type or place than this rank's. On every rank.
    """
    failure = f"{file} cannot be restored"
    tensors = into.tensors()

    def read() -> None:
        parts, stored = own_parts(tensors), _stored_in([file])
        _check_own(parts, stored)
        _read(_wanted(parts, stored))

    all_or_none(read, process_group, failure)
    all_or_none(lambda: into.put_back(tensors), process_group, failure)


def _stored_in(files: Iterable[Path]) -> dict[str, list[StoredPart]]:
    """The parts of each tensor; one of those that begin at the same place, as every replica stores
    its own snapshot."""
    found: dict[str, dict[tuple[int, ...], StoredPart]] = defaultdict(dict)
    for path in files:
        try:
            with io.FileIO(path) as file:
                header = read_header(file)
            offsets = offsets_in(header)
        except Damaged as error:
            raise CheckpointError(f"{path.name} is damaged: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
        for name, place in header.tensors.items():
            first = found[name].setdefault(offsets[name], StoredPart(path, place, offsets[name]))
            if first.place.shape != place.shape:
                raise CheckpointError(
                    f"its files disagree about the part of tensor {name} at {list(offsets[name])}"
                )
    return {name: list(parts.values()) for name, parts in found.items()}


def _check_whole(
    wanted: Mapping[str, Tensor], stored: Mapping[str, list[StoredPart]], convert: bool
) -> None:
    """Compare all that is stored with all that is to be filled, on whatever rank."""
    with_optimizer = any(name.startswith(OPTIMIZER) for name in wanted)
    considered = {name for name in stored if with_optimizer or not name.startswith(OPTIMIZER)}
    _check_names(wanted, considered, "this model")
    for name, tensor in wanted.items():
        parts = stored[name]
        ends = (
            [a + b for a, b in zip(part.offsets, part.place.shape, strict=True)] for part in parts
        )
        # The stored shape is known from the parts alone, so a part lost at the end shows as a
        # smaller tensor.
        shape = []
        if len({len(part.offsets) for part in parts}) == 1:
            shape = [max(end) for end in zip(*ends, strict=True)]
        if shape != list(tensor.shape):
            raise CheckpointError(
                f"tensor {name} has shape {shape} in it and {list(tensor.shape)} here"
            )
        for part in parts:
            if part.place.dtype != tensor.dtype and not convert:
                raise CheckpointError(
                    f"tensor {name} has type {part.place.dtype} in it and {tensor.dtype} here"
                )
        if sum(math.prod(part.place.shape) for part in parts) != tensor.numel():
            raise CheckpointError(f"tensor {name} is incomplete in it: a shard is missing")


def _check_own(parts: Mapping[str, OwnPart], stored: Mapping[str, list[StoredPart]]) -> None:
    """Compare what is stored with this rank's own parts."""
    _check_names(parts, stored.keys(), "this model on this rank")
    for name, (local, begins) in parts.items():
        (part,) = stored[name]  # a file names nothing twice
        if part.place.shape != tuple(local.shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(part.place.shape)} in it and {list(local.shape)} "
                "here"
            )
        if part.place.dtype != local.dtype:
            raise CheckpointError(
                f"tensor {name} has type {part.place.dtype} in it and {local.dtype} here"
            )
        if part.offsets != begins:
            raise CheckpointError(
                f"tensor {name} begins at {list(part.offsets)} of the whole in it and "
                f"{list(begins)} here"
            )


def _check_names(wanted: Iterable[str], stored: Iterable[str], whose: str) -> None:
    if missing := sorted(set(wanted) - set(stored)):
        raise CheckpointError(f"tensor {missing[0]} is not in it{_and_more(missing)}")
    if unexpected := sorted(set(stored) - set(wanted)):
        raise CheckpointError(
            f"its tensor {unexpected[0]} belongs to no part of {whose}{_and_more(unexpected)}"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _wanted(
    parts: Mapping[str, OwnPart], stored: Mapping[str, list[StoredPart]]
) -> dict[Path, list[WantedPart]]:
    """What to read of each file, in the order in which it stands there."""
    wanted: dict[Path, list[WantedPart]] = defaultdict(list)
    for name, (local, begins) in parts.items():
        ends = [begin + size for begin, size in zip(begins, local.shape, strict=True)]
        for path, place, offsets in stored[name]:
            first = tuple(map(max, zip(begins, offsets, strict=True)))
            last = [
                min(end, offset + size)
                for end, offset, size in zip(ends, offsets, place.shape, strict=True)
            ]
            lengths = tuple(end - begin for begin, end in zip(first, last, strict=True))
            if all(length > 0 for length in lengths):  # a number, which has no dimension, too
                target = local[
                    tuple(slice(a - b, c - b) for a, b, c in zip(first, begins, last, strict=True))
                ]
                within = tuple(begin - offset for begin, offset in zip(first, offsets, strict=True))
                wanted[path].append(WantedPart(place, target, within, lengths))
    return {
        path: sorted(items, key=lambda item: item.place.begin)
        for path, items in sorted(wanted.items())
    }


def _read(wanted: Mapping[Path, list[WantedPart]]) -> None:
    # Two at a time: one alone leaves the disk idle while it copies.
    halves = [(path, half) for path, items in wanted.items() for half in _halves(items) if half]
    with ThreadPoolExecutor(2, thread_name_prefix="load") as readers:
        for _ in readers.map(lambda half: _read_one(*half), halves):
            pass


def _halves(items: list[WantedPart]) -> tuple[list[WantedPart], list[WantedPart]]:
    """What begins in the first half of the bytes that they span, and the rest."""
    middle = (items[0].place.begin + items[-1].place.end) // 2
    first = [item for item in items if item.place.begin < middle]
    return first, items[len(first) :]


def _read_one(path: Path, items: list[WantedPart]) -> None:
    reader = PartReader()
    try:
        with io.FileIO(path) as file, torch.no_grad():
            for place, target, offsets, lengths in items:
                reader.read(file, place, target, offsets, lengths)
    except Damaged as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
