"""A committed checkpoint back into what trains or evaluates, on any number of ranks; all of it, or
an error.

Nothing is unpickled: the shards are safetensors, the rest is JSON, and no other file of the folder
is opened.
"""

from pathlib import Path

import torch.distributed as dist

from opt_train.checkpoint.all_or_none import together
from opt_train.checkpoint.load import load, load_own
from opt_train.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    Progress,
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
    progress: Progress | None = None,
    convert: bool = False,
    rank_file: Path | None = None,
) -> None:
    """Load the checkpoint in `folder`. Called by all ranks of `process_group` together.

    The files are verified first, each by one of the ranks, so that a large checkpoint is not read
    whole by each. What an optimizer is told (learning rate, betas, decay) stays as it is. If
    anything is wrong, what it went into must not be used: the error is meant to end the rank.

    Args:
        into: without optimizer state the weights alone are restored.
        manifest: from `manifest.read`, with the hash that the supervisor sent.
        process_group: one that communicates CPU tensors (gloo); default: the default group.
        progress: told this rank's verified bytes.
        convert: take tensors of another type too, as weights from elsewhere have.
        rank_file: this rank's own file of a snapshot, on all ranks or none, where the ranks are
            spread as those that took it. It alone is then read and verified: the others' files may
            be on other nodes.

    Raises:
        CheckpointError: a file is not as the manifest has it, or a tensor is missing, unexpected,
            incomplete, or of another shape, or of another type without `convert`. On every rank.
    """
    alone = not dist.is_initialized()
    rank, world = (
        (0, 1) if alone else (dist.get_rank(process_group), dist.get_world_size(process_group))
    )
    failure = f"{folder} cannot be restored"
    if rank_file is not None and manifest.state.get(PARTS) == OWN:
        own = rank_file
        together(lambda: _verify_own(own, manifest, progress), process_group, failure)
        load_own(into, own, process_group)
        return
    together(lambda: _verify_share(folder, manifest, rank, world, progress), process_group, failure)
    load(into, folder, process_group, convert=convert)


def _verify_own(file: Path, manifest: Manifest, progress: Progress | None) -> None:
    if (entry := manifest.files.get(file.name)) is None:
        raise CheckpointError(f"{file.name} is not in the manifest")
    check_file(file, entry, progress)


def _verify_share(
    folder: Path, manifest: Manifest, rank: int, world: int, progress: Progress | None
) -> None:
    if rank == 0:
        check_sizes(folder, manifest)
    mine = list(manifest.files.items())[rank::world]
    total = sum(entry.bytes for _, entry in mine)
    done = 0
    for path, entry in mine:
        check_file(
            folder / path, entry, None if progress is None else shifted(progress, done, total)
        )
        done += entry.bytes
