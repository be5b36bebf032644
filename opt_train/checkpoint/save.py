"""Every rank writes its part of a checkpoint, fsynced, and hashed on the way.

Theory of operation
===================

Four parties, each of which does one thing:

plans     torch.distributed.checkpoint, over all ranks: which of them writes which part of each
          tensor. Of what several ranks hold (replicas, numbers) it has one write it.
writes    this file: one safetensors file a rank, with the offsets of its parts in the header, which
          torch's own Hugging Face reader understands. Rank 0 writes `state.json` too.
fsyncs    `DurableFile`, in pieces while the next are being written, and at the end the folder. What
          a rank reports is on the disk, with size and sha256 as they were in its memory: nothing is
          read back.
commits   whoever leads the run (the supervisor, or a standalone `train`), when all ranks have
          reported one step: `commit.commit_manifest`. Ranks never do, because no rank knows what
          became of the others after it had reported.

What a crash leaves, wherever it comes:

before all ranks have reported    a folder without a manifest. It is no checkpoint, nobody reads it,
                                  and it is removed before the next attempt begins.
before the manifest's rename      the same, with `manifest.json.partial`.
between rename and journal        a whole checkpoint that the journal does not know. It is removed
                                  too: what may be restored is what the journal says.
after the journal's line          a checkpoint.
in a retirement                   the manifest goes first, durably. What is left is again a folder
                                  without one: never a manifest over files that are half gone.

An error, as opposed to a crash, fails the save on every rank (`all_or_none`), gives the space back,
and lets training go on: a full disk must not be what keeps the next save from succeeding.

Why not torch's own writer: `FileSystemWriter` describes its files in `.metadata`, which is a
pickle, and keeps what is not a tensor as `torch.save` writes it, another one; a file planted there
ran code when the checkpoint was loaded. `HuggingFaceStorageWriter` has neither, and is what
`_Writer` derives from; but it makes the whole file in memory first and does not fsync.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from opt_train.checkpoint.all_or_none import all_or_none
from opt_train.checkpoint.commit import retire_checkpoint
from opt_train.checkpoint.durable_file import DurableFile, sync_folder
from opt_train.checkpoint.held_folder import HeldFolder
from opt_train.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    ReportProgress,
    state_content,
)
from opt_train.checkpoint.safetensors_file import sharding_metadata, write_safetensors
from opt_train.protocol.facts import SavedFile

SHARD_NAME = "shard-{:05d}-model-00001-of-00001.safetensors"
"""As torch names the files of ranks."""


def save(
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    folder: Path,
    *,
    run_folder: HeldFolder | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: ReportProgress | None = None,
) -> tuple[SavedFile, ...]:
    """Write this rank's part of a checkpoint into `folder`. Called by all ranks of `process_group`
    together.

    What an earlier, uncommitted save left in `folder` is removed; a committed checkpoint is never
    touched. A save that fails on any rank fails on all, and gives its space back.

    Args:
        tensors: from `tensors_of`.
        state: what is not a tensor, as JSON values; rank 0's is written as `state.json`.
        run_folder: the run directory as it was when the attempt began, above `folder`; default: the
            one that is there now.
        process_group: one that communicates CPU tensors (gloo); default: the default group. Without
            torch.distributed the process saves by itself.
        progress: called with this rank's durable and expected bytes.

    Returns:
        This rank's files; paths relative to `folder`.

    Raises:
        CheckpointError: the save failed, here or on another rank; training can go on.
    """
    is_single = not dist.is_initialized()
    is_first = is_single or dist.get_rank(process_group) == 0
    # The folder, open: so its inode is nobody else's meanwhile, though it were removed.
    descriptors: list[int] = []

    def prepare() -> None:
        if is_first:
            descriptors.append(_make_empty(folder, run_folder))

    expected = sum(_local_bytes(tensor) for tensor in tensors.values())
    writer = _Writer(
        folder, None if progress is None else lambda done: progress(done, max(done, expected))
    )

    def write() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save_tensors(
                dict(tensors), storage_writer=writer, process_group=process_group, no_dist=is_single
            )
        if is_first:
            with DurableFile(folder / STATE) as file:
                file.write(state_content(state))
            writer.written[folder / STATE] = (file.size, file.sha256)
        sync_folder(folder)

    try:
        all_or_none(prepare, process_group, f"{folder} cannot be prepared")
        all_or_none(write, process_group, f"{folder} was not saved")
    except CheckpointError:
        # Nobody writes any more. On a full disk the leftovers would be what keeps the next save
        # from succeeding.
        for descriptor in descriptors:
            _remove(folder, descriptor)
        raise
    finally:
        for descriptor in descriptors:
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


def _make_empty(folder: Path, run_folder: HeldFolder | None) -> int:
    """Make the folder, and open it."""
    # Asked so that an error stays one: what cannot be looked at is not to be taken for what is not
    # there.
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).lstat()
        raise CheckpointError("it is a committed checkpoint already")
    retire_checkpoint(folder)
    # checkpoints/<attempt>/<step>, and not the run directory itself: whoever removed it does not
    # want it back.
    (run_folder or HeldFolder(folder.parents[2])).make_below(folder)
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
            retire_checkpoint(folder)


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
