"""A committed checkpoint back into what trains or evaluates, on any number of ranks; all of it, or an error.

Nothing is unpickled: the shards are safetensors, the rest is JSON, and no other file of the folder is opened.
"""

import contextlib
import io
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.futures import Future

from opt_train.checkpoint.agreement import together
from opt_train.checkpoint.manifest import CheckpointError, Manifest, Progress, check_file, check_sizes, shifted
from opt_train.checkpoint.safetensors_file import PartReader, read_header
from opt_train.checkpoint.snapshot import OWN, PARTS, load_own
from opt_train.checkpoint.tensors import OPTIMIZER, Restorable


def restore(
    into: Restorable,
    folder: Path,
    manifest: Manifest,
    *,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    convert: bool = False,
    rank_file: Path | None = None,
) -> None:
    """Load the checkpoint in `folder`. Called by all ranks of `process_group` together.

    The files are verified first, each by one of the ranks, so that a large checkpoint is not read whole by each. What
    an optimizer is told (learning rate, betas, decay) stays as it is. If anything is wrong, what it went into must not
    be used: the error is meant to end the rank.

    Args:
        into: without optimizer state the weights alone are restored.
        manifest: from `manifest.read`, with the hash that the supervisor sent.
        process_group: one that communicates CPU tensors (gloo); default: the default group.
        progress: told this rank's verified bytes.
        convert: take tensors of another type too, as weights from elsewhere have.
        rank_file: this rank's own file of a snapshot, on all ranks or none, where the ranks are spread as those that
            took it. It alone is then read and verified: the others' files may be on other nodes.

    Raises:
        CheckpointError: a file is not as the manifest has it, or a tensor is missing, unexpected, incomplete, or of
            another shape, or of another type without `convert`. On every rank.
    """
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(process_group), dist.get_world_size(process_group))
    failure = f"{folder} cannot be restored"
    if rank_file is not None and manifest.state.get(PARTS) == OWN:
        own = rank_file
        together(lambda: _verify_own(own, manifest, progress), process_group, failure)
        load_own(into, own, process_group)
        return
    together(lambda: _verify_share(folder, manifest, rank, world, progress), process_group, failure)
    load(into, folder, process_group, convert=convert)


def load(
    into: Restorable, folder: Path, process_group: dist.ProcessGroup | None = None, *, convert: bool = False
) -> None:
    """The part of `restore` behind the verification.

    Raises:
        CheckpointError: a tensor is missing, unexpected, incomplete, of another shape, or of another type without
            `convert`. On every rank.
    """
    failure = f"{folder} cannot be restored"
    tensors = into.tensors()
    whole = any(name.startswith(OPTIMIZER) for name in tensors)
    reader = _Reader(folder)
    together(lambda: _check_same(tensors, reader.read_metadata(), whole, convert), process_group, failure)

    def read() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_tensors(tensors, storage_reader=reader, process_group=process_group, no_dist=not dist.is_initialized())
        into.put_back(tensors)

    together(read, process_group, failure)


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of all shards once instead of at every question."""

    def __init__(self, folder: Path) -> None:
        super().__init__(path=str(folder))
        self._metadata: Metadata | None = None

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*arguments, **named)
            for name, tensor in self._metadata.state_dict_metadata.items():
                if isinstance(tensor, TensorStorageMetadata):
                    tensor.chunks = _each_once(name, tensor.chunks)
        return self._metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Have the disk begin with what this rank will read, while the ranks still agree on who reads what."""
        wanted = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        Thread(target=_read_ahead, args=(sorted(wanted),), name="read ahead", daemon=True).start()
        return super().prepare_local_plan(plan)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch's, which maps the files and copies from there, at half of what the disk gives."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        reader = PartReader()
        for path, items in sorted(by_file.items()):
            with io.FileIO(path) as file:
                places = read_header(file).tensors
                for item in sorted(items, key=lambda item: places[item.storage_index.fqn].begin):
                    target = planner.resolve_tensor(item).detach()
                    place = places[item.storage_index.fqn]
                    reader.read(file, place, target, tuple(item.storage_offsets), tuple(item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_ahead(paths: list[str]) -> None:
    """Ask the system to have these files in its memory soon. A wish: whoever reads them finds out what is wrong."""
    for path in paths:
        with contextlib.suppress(OSError), io.FileIO(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _each_once(name: str, chunks: list[ChunkStorageMetadata]) -> list[ChunkStorageMetadata]:
    """One of the chunks that begin at the same place: in a snapshot every replica has stored its own.

    Raises:
        CheckpointError: they are of different shapes.
    """
    found = {tuple(chunk.offsets): chunk for chunk in chunks}
    for chunk in chunks:
        if chunk.sizes != found[tuple(chunk.offsets)].sizes:
            raise CheckpointError(f"its files disagree about the part of tensor {name} at {list(chunk.offsets)}")
    return list(found.values())


def _verify_own(file: Path, manifest: Manifest, progress: Progress | None) -> None:
    if (entry := manifest.files.get(file.name)) is None:
        raise CheckpointError(f"{file.name} is not in the manifest")
    check_file(file, entry, progress)


def _verify_share(folder: Path, manifest: Manifest, rank: int, world: int, progress: Progress | None) -> None:
    if rank == 0:
        check_sizes(folder, manifest)
    mine = list(manifest.files.items())[rank::world]
    total = sum(entry.bytes for _, entry in mine)
    done = 0
    for path, entry in mine:
        check_file(folder / path, entry, None if progress is None else shifted(progress, done, total))
        done += entry.bytes


def _check_same(wanted: Mapping[str, torch.Tensor], metadata: Metadata, with_optimizer: bool, convert: bool) -> None:
    """The loader copies with conversion and passes over what it does not know: so all is compared before."""
    stored = metadata.state_dict_metadata
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"tensor {missing[0]} is not in it{_and_more(missing)}")
    unexpected = sorted(
        name for name in stored.keys() - wanted.keys() if with_optimizer or not name.startswith(OPTIMIZER)
    )
    if unexpected:
        raise CheckpointError(f"its tensor {unexpected[0]} belongs to no part of this model{_and_more(unexpected)}")
    for name, tensor in wanted.items():
        there = stored[name]
        if not isinstance(there, TensorStorageMetadata):
            raise CheckpointError(f"{name} in it is no tensor")
        # The stored size is known from the pieces alone, so a piece lost at the end shows as a smaller tensor.
        if there.size != tensor.shape:
            raise CheckpointError(f"tensor {name} has shape {list(there.size)} in it and {list(tensor.shape)} here")
        if there.properties.dtype != tensor.dtype and not convert:
            raise CheckpointError(f"tensor {name} has type {there.properties.dtype} in it and {tensor.dtype} here")
        if sum(math.prod(chunk.sizes) for chunk in there.chunks) != tensor.numel():
            raise CheckpointError(f"tensor {name} is incomplete in it: a shard is missing")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
