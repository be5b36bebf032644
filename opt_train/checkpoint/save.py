"""Every rank writes its shards, fsynced and hashed on the way. Whether they are a checkpoint, a manifest decides later.

The tensors go through torch.distributed.checkpoint's Hugging Face writer into safetensors files. Its own `.metadata`
and `torch.save` are pickles and are not used.
"""

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from opt_train.checkpoint.agreement import together
from opt_train.checkpoint.manifest import MANIFEST, STATE, CheckpointError, Progress, retire, sync_folder, write_durably
from opt_train.protocol.facts import SavedFile
from opt_train.protocol.framing import to_payload

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIECE_BYTES = 1 << 26
"""Progress is told, and bytes are made durable, in pieces of this size."""


def save(
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    folder: Path,
    *,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> tuple[SavedFile, ...]:
    """Write this rank's part of a checkpoint into `folder`. Called by all ranks of `process_group` together.

    What an earlier, uncommitted save left in `folder` is removed; a committed checkpoint is never touched. A save that
    fails on any rank fails on all, and gives its space back.

    Args:
        tensors: from `tensors_of`.
        state: what is not a tensor, as JSON values; rank 0's is written as `state.json`.
        process_group: one that communicates CPU tensors (gloo); default: the default group. Without torch.distributed
            the process saves alone.
        progress: told this rank's durable and expected bytes.

    Returns:
        This rank's files; paths relative to `folder`.

    Raises:
        CheckpointError: the save failed, here or on another rank; training can go on.
    """
    alone = not dist.is_initialized()
    first = alone or dist.get_rank(process_group) == 0
    together(lambda: _make_empty(folder) if first else None, process_group, f"{folder} cannot be prepared")

    expected = sum(_local_bytes(tensor) for tensor in tensors.values())
    files = _DurableFiles(None if progress is None else lambda done: progress(done, max(done, expected)))

    def write() -> None:
        writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
        writer.fs = files
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save_tensors(dict(tensors), storage_writer=writer, process_group=process_group, no_dist=alone)
        if first:
            content = (json.dumps(to_payload(state), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
            write_durably(folder / STATE, content)
            files.written[folder / STATE] = (len(content), hashlib.sha256(content).hexdigest())
        sync_folder(folder)

    try:
        together(write, process_group, f"{folder} was not saved")
    except CheckpointError:
        # Nobody writes any more. On a full disk the leftovers would be what keeps the next save from succeeding.
        if first:
            _remove(folder)
        raise
    return tuple(
        SavedFile(path.relative_to(folder).as_posix(), size, sha256)
        for path, (size, sha256) in sorted(files.written.items())
    )


class _DurableFiles(FileSystem):
    """torch's file system with files that are hashed as they are written and durable when they are closed."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self.written: dict[Path, tuple[int, str]] = {}
        """Size and sha256 of every file closed."""
        self._progress = progress
        self._done = 0

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _DurableFile(path, mode, self._durable) as stream:
            yield stream
        self.written[Path(path)] = (stream.size, stream.digest.hexdigest())

    def _durable(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done)


class _DurableFile(io.FileIO):
    """A new file, written once from front to back."""

    def __init__(self, path: str | os.PathLike[str], mode: str, durable: Callable[[int], None]) -> None:
        super().__init__(path, mode)
        self.size = 0
        self.digest = hashlib.sha256()
        self._durable = durable

    def write(self, content: "ReadableBuffer", /) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self.digest.update(piece)
            self.size += len(piece)
            while piece:  # the system may take less than it was given, a full disk for one
                piece = piece[super().write(piece) :]
            # Piece by piece: the progress told is then of bytes on the disk, and never stands still in one long fsync.
            os.fdatasync(self.fileno())
            self._durable(min(PIECE_BYTES, len(view) - start))
        return len(view)

    def close(self) -> None:
        try:
            if not self.closed:
                os.fsync(self.fileno())
        finally:
            super().close()


def _make_empty(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise CheckpointError("it is a committed checkpoint already")
    retire(folder)
    # checkpoints/<attempt>/<step>, and not the run directory itself: whoever removed it does not want it back.
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    sync_folder(folder.parent)
    sync_folder(folder.parent.parent)


def _remove(folder: Path) -> None:
    """Best effort: what stays has no manifest, so it harms nobody, and the next save here clears it."""
    with contextlib.suppress(OSError):
        retire(folder)


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
