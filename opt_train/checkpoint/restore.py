"""A committed checkpoint back into what trains or evaluates, on any number of ranks; all of it, or
an error.

Two steps, each of which succeeds on every rank or on none:

1. `verify_files`. The ranks divide the files among them, and each hashes its share. So every byte
   is read and compared once over the world, by as many readers as there are ranks, before any rank
   puts anything into its memory. Nobody has done so before them: the supervisor compares the
   manifest's hash and the files' sizes alone, since one thread of it would take some 20 minutes
   over the 2 TB of a 175B model.
2. `load_files`. Each rank cuts what it needs out of the shards. On the layout that saved, that is
   the shard it has just hashed, from the system's cache. On another layout it reads slices of files
   that other ranks have hashed, and which nobody may change: a committed file is never written to.

Nothing is unpickled: the shards are safetensors, the rest is JSON, and no other file of the folder
is opened.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from opt_train.checkpoint.all_or_none import all_or_none
from opt_train.checkpoint.late_files import LATE_SECONDS, retry_while_late
from opt_train.checkpoint.load import load, load_own
from opt_train.checkpoint.manifest import (
    CheckpointError,
    FileEntry,
    Manifest,
    ReportProgress,
    check_file,
    check_sizes,
    shifted,
)
from opt_train.checkpoint.snapshot import OWN, PARTS
from opt_train.checkpoint.tensors import Restorable


def restore(
    into: Restorable,
    folder: Path,
    manifest: Manifest,
    *,
    process_group: dist.ProcessGroup | None = None,
    progress: ReportProgress | None = None,
    convert: bool = False,
    rank_file: Path | None = None,
) -> None:
    """Verify the checkpoint in `folder`, and load it. Called by all ranks of `process_group`
    together.

    What an optimizer is configured with (learning rate, betas, decay) stays as it is. If anything
    is wrong, what it went into must not be used: the error is meant to end the rank.

    Args:
        into: without optimizer state the weights alone are restored.
        manifest: from `manifest.read`, with the hash that the supervisor sent.
        process_group: one that communicates CPU tensors (gloo); default: the default group.
        progress: called with this rank's verified bytes.
        convert: take tensors of another type too, as weights from elsewhere have.
        rank_file: this rank's own file of a snapshot, on all ranks or none, where the ranks are
            spread as those that took it. It alone is then read and verified: the others' files may
            be on other nodes.

    Raises:
        CheckpointError: a file is not as the manifest has it, or a tensor is missing, unexpected,
            incomplete, or of another shape, or of another type without `convert`. On every rank.
    """
    verify_files(
        folder, manifest, process_group=process_group, progress=progress, rank_file=rank_file
    )
    load_files(
        into, folder, manifest, process_group=process_group, convert=convert, rank_file=rank_file
    )


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    process_group: dist.ProcessGroup | None = None,
    progress: ReportProgress | None = None,
    rank_file: Path | None = None,
    patient: bool = False,
) -> None:
    """Compare every byte of the checkpoint in `folder` with its manifest, each file on one of the
    ranks. Called by all ranks of `process_group` together; for the arguments see `restore`.

    Args:
        patient: look again at a file that a shared file system may show late, for `LATE_SECONDS`.

    Raises:
        CheckpointError: a file is missing, short, long or flipped, or a shard lies there that is
            not in the manifest. On every rank, whichever found it.
    """

    waiting = _report_waiting(progress)
    seconds = LATE_SECONDS if patient else 0.0

    def verify_share() -> None:
        rank, world_size = _place_in(process_group)
        if rank == 0 and not _is_own(manifest, rank_file):
            retry_while_late(folder, lambda: check_sizes(folder, manifest), waiting, seconds)
        share = _share_of(rank, world_size, folder, manifest, rank_file)
        total, done = sum(entry.bytes for _, entry in share), 0
        for path, entry in share:
            reported = None if progress is None else shifted(progress, done, total)
            retry_while_late(folder, partial(check_file, path, entry, reported), waiting, seconds)
            done += entry.bytes

    all_or_none(verify_share, process_group, f"{folder} cannot be restored")


def load_files(
    into: Restorable,
    folder: Path,
    manifest: Manifest,
    *,
    process_group: dist.ProcessGroup | None = None,
    convert: bool = False,
    rank_file: Path | None = None,
) -> None:
    """Load what `verify_files` has verified; called, and failing, as `restore` is."""
    if rank_file is not None and _is_own(manifest, rank_file):
        load_own(into, rank_file, process_group)
    else:
        load(into, folder, process_group, convert=convert)


def _is_own(manifest: Manifest, rank_file: Path | None) -> bool:
    """Whether each rank reads its own file of a snapshot, and nothing else."""
    return rank_file is not None and manifest.state.get(PARTS) == OWN


def _share_of(
    rank: int, world_size: int, folder: Path, manifest: Manifest, rank_file: Path | None
) -> list[tuple[Path, FileEntry]]:
    """The files that `rank` hashes; those of all ranks are all that are read."""
    if rank_file is not None and _is_own(manifest, rank_file):
        if (own := manifest.files.get(rank_file.name)) is None:
            raise CheckpointError(f"{rank_file.name} is not in the manifest")
        return [(rank_file, own)]
    # In the order of the names: on the layout that saved, each rank hashes the very shard that it
    # then loads, from the system's cache.
    names = sorted(manifest.files)[rank::world_size]
    return [(folder / name, manifest.files[name]) for name in names]


def _place_in(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and world size; those of a process by itself without torch.distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def _report_waiting(progress: ReportProgress | None) -> Callable[[], None]:
    """What is done while a late file is waited for: the wait has an end, so it is no hang."""
    if progress is None:
        return lambda: None
    return lambda: progress(0, 0)
