"""Every rank writes its shards, fsynced and hashed on the way. Whether they are a checkpoint, a
manifest decides later.

torch.distributed.checkpoint plans who writes what, and its Hugging Face reader reads it: one
safetensors file a rank, with the offsets of its parts. Its `.metadata` and `torch.save` are pickles
and are not used.
"""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from opt_train.checkpoint.all_or_none import together
from opt_train.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    Progress,
    naming,
    retire,
    state_content,
    sync_folder,
)
from opt_train.checkpoint.safetensors_file import sharding_metadata, write_safetensors
from opt_train.protocol.facts import SavedFile

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIECE_BYTES = 1 << 26
"""Progress is told, and bytes are made durable, in pieces of about this size."""

SHARD_NAME = "shard-{:05d}-model-00001-of-00001.safetensors"
"""As torch names the files of ranks."""


def save(
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    folder: Path,
    *,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> tuple[SavedFile, ...]:
    """Write this rank's part of a checkpoint into `folder`. Called by all ranks of `process_group`
    together.

    What an earlier, uncommitted save left in `folder` is removed; a committed checkpoint is never
    touched. A save that fails on any rank fails on all, and gives its space back.

    Args:
        tensors: from `tensors_of`.
        state: what is not a tensor, as JSON values; rank 0's is written as `state.json`.
        process_group: one that communicates CPU tensors (gloo); default: the default group. Without
            torch.distributed the process saves alone.
        progress: told this rank's durable and expected bytes.

    Returns:
        This rank's files; paths relative to `folder`.

    Raises:
        CheckpointError: the save failed, here or on another rank; training can go on.
    """
    alone = not dist.is_initialized()
    first = alone or dist.get_rank(process_group) == 0
    made: list[
        int
    ] = []  # the folder, open: so its inode is nobody else's meanwhile, though it were removed

    def prepare() -> None:
        if first:
            made.append(_make_empty(folder))

    expected = sum(_local_bytes(tensor) for tensor in tensors.values())
    writer = _Writer(
        folder, None if progress is None else lambda done: progress(done, max(done, expected))
    )

    def write() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save_tensors(
                dict(tensors), storage_writer=writer, process_group=process_group, no_dist=alone
            )
        if first:
            with DurableFile(folder / STATE) as file:
                file.write(state_content(state))
            writer.written[folder / STATE] = (file.size, file.sha256)
        sync_folder(folder)

    try:
        together(prepare, process_group, f"{folder} cannot be prepared")
        together(write, process_group, f"{folder} was not saved")
    except CheckpointError:
        # Nobody writes any more. On a full disk the leftovers would be what keeps the next save
        # from succeeding.
        for descriptor in made:
            _remove(folder, descriptor)
        raise
    finally:
        for descriptor in made:
            os.close(descriptor)
    return tuple(
        SavedFile(path.relative_to(folder).as_posix(), size, sha256)
        for path, (size, sha256) in sorted(writer.written.items())
    )


class _Writer(HuggingFaceStorageWriter):
    """torch's writer with a hand of its own: what it writes is durable, hashed, and nowhere in
    memory a second time."""

    def __init__(self, folder: Path, progress: Callable[[int], None] | None) -> None:
        super().__init__(path=str(folder), save_distributed=True)
        self.written: dict[Path, tuple[int, str]] = {}
        """Size and sha256 of every file."""
        self._folder = folder
        self._progress = progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors into one file."""
        done: Future[list[WriteResult]] = Future()
        results, tensors, offsets = [], {}, {}
        for item in plan.items:
            tensor, chunk = planner.resolve_data(item), item.tensor_data
            assert isinstance(tensor, torch.Tensor)
            assert chunk is not None
            name = item.index.fqn
            assert name not in tensors, f"two parts of {name} on one rank"
            tensors[name] = tensor.cpu()
            offsets[name] = chunk.chunk.offsets
            results.append(WriteResult(item.index, tensor.numel() * tensor.element_size(), None))
        if tensors:
            path = self._folder / SHARD_NAME.format(plan.storage_data["shard_index"])
            with DurableFile(path, self._progress) as file:
                write_safetensors(file, tensors, sharding_metadata(offsets))
            self.written[path] = (file.size, file.sha256)
        done.set_result(results)
        return done


class DurableFile:
    """A new file, written once from front to back, hashed as it is written and durable when it is
    closed.

    One that is there already is an error: two that write into one file make it neither's.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Open it.

        Args:
            progress: told the durable bytes now and then.
        """
        self._file = io.FileIO(path, "x")
        self._path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._progress = progress
        # One that hashes, in order and perhaps behind what is written; one that waits for the disk.
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._synced: tuple[int, futures.Future[None]] | None = None
        """Bytes that will be durable, and when."""
        self._asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._hasher.shutdown(cancel_futures=raised[0] is not None)
        self._syncer.shutdown()
        try:
            with naming(self._path):
                self._wait_durable()
                os.fsync(self._file.fileno())
            self._tell(self.size)
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        """Of the file, once it is closed."""
        return self._digest.hexdigest()

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write all of `content`, piece by piece. It must not change before the file is closed.

        Raises:
            OSError: the file system takes no more.
        """
        view = memoryview(content).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._hasher.submit(self._digest.update, piece)
            with naming(self._path):
                self._write(piece)
        return len(view)

    def _write(self, piece: memoryview) -> None:
        self.size += len(piece)
        while piece:  # the system may take less than it was given, a full disk for one
            piece = piece[self._file.write(piece) :]
        # Now and then: the progress told is then of bytes on the disk, and never stands still in
        # one long fsync. While the disk takes these, the next are copied into the system's memory.
        if self.size - self._asked >= PIECE_BYTES:
            self._wait_durable()
            self._asked = self.size
            self._synced = (self.size, self._syncer.submit(os.fdatasync, self._file.fileno()))

    def _wait_durable(self) -> None:
        """Wait for the bytes that were sent to the disk, if any were. Raises OSError if it does not
        take them."""
        synced, self._synced = self._synced, None
        if synced is not None:
            synced[1].result()
            self._tell(synced[0])

    def _tell(self, durable: int) -> None:
        if self._progress is not None:
            self._progress(durable)


def _make_empty(folder: Path) -> int:
    """Make the folder, and open it."""
    # Asked so that an error stays one: what cannot be looked at is not to be taken for what is not
    # there.
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).lstat()
        raise CheckpointError("it is a committed checkpoint already")
    retire(folder)
    # checkpoints/<attempt>/<step>, and not the run directory itself: whoever removed it does not
    # want it back.
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    sync_folder(folder.parent)
    sync_folder(folder.parent.parent)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether the folder of that name is the one that was opened, and not one made in its place."""
    return os.path.samestat(folder.stat(), os.fstat(descriptor))


def _remove(folder: Path, descriptor: int) -> None:
    """Best effort: what stays has no manifest, so it harms nobody, and the next save here clears
    it.

    Another save's folder in the place of ours is not ours to remove: it may be a checkpoint by now.
    """
    with contextlib.suppress(OSError):
        if _is_still(folder, descriptor):
            retire(folder)


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
