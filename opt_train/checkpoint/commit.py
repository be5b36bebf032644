"""What makes a folder of shards a checkpoint, and what unmakes it.

A checkpoint is committed by one rename, after everything that its manifest vouches for is durable,
and retired by one removal, before anything that it vouches for is touched. So at no moment does a
manifest stand over files that are not all there, wherever a crash comes.

Standard library only: the supervisor imports this file and no torch.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opt_train.checkpoint.durable_file import sync_folder, write_durably
from opt_train.checkpoint.manifest import (
    MANIFEST,
    SHARD_SUFFIX,
    STATE,
    CheckpointError,
    FileEntry,
    Manifest,
    check_names,
    check_no_stray_shard,
    check_size,
    parse_object,
    read_file,
)
from opt_train.protocol.framing import to_payload


def build_manifest(
    folder: Path,
    attempt: str,
    step: int,
    files: Mapping[str, tuple[int, str]],
    *,
    config_sha256: str = "",
    journal_head: str = "",
) -> Manifest:
    """The manifest of what the ranks reported to have saved in `folder`: path to (bytes, sha256).

    Raises:
        CheckpointError: a reported file is not there in its full size, a shard lies there that was
            not reported, no shard or no `state.json` was reported, or the state's bytes are not the
            reported ones.
    """
    entries = {path: FileEntry(*files[path]) for path in sorted(files)}
    check_names(folder, entries)
    for path, entry in entries.items():
        check_size(folder / path, entry)
    if not any(path.endswith(SHARD_SUFFIX) for path in entries):
        raise CheckpointError(f"no shard of {folder} was reported")
    if STATE not in entries:
        raise CheckpointError(f"{folder / STATE} was not reported")
    check_no_stray_shard(folder, entries)
    content = read_file(folder / STATE)
    if hashlib.sha256(content).hexdigest() != entries[STATE].sha256:
        raise CheckpointError(f"{folder / STATE} has a wrong checksum")
    state = parse_object(folder / STATE, content)
    return _manifest_of(attempt, step, entries, state, config_sha256, journal_head)


def manifest_of_reports(
    attempt: str,
    step: int,
    files: Mapping[str, tuple[int, str]],
    state: Mapping[str, Any],
    *,
    config_sha256: str = "",
    journal_head: str = "",
) -> Manifest:
    """The manifest of files that lie elsewhere, as the agents that hold them reported them; `state`
    is `state.json`'s content.

    Raises:
        CheckpointError: no shard or no `state.json` was reported.
    """
    entries = {path: FileEntry(*files[path]) for path in sorted(files)}
    where = Path(f"step {step} of attempt {attempt}")
    check_names(where, entries)
    if STATE not in entries or not any(path.endswith(SHARD_SUFFIX) for path in entries):
        raise CheckpointError(f"no shard, or no {STATE}, of {where} was reported")
    return _manifest_of(attempt, step, entries, state, config_sha256, journal_head)


def _manifest_of(
    attempt: str,
    step: int,
    entries: Mapping[str, FileEntry],
    state: Mapping[str, Any],
    config: str,
    head: str,
) -> Manifest:
    return Manifest(attempt, step, entries, state, config, head, state.get("layout") or {})


def commit_manifest(folder: Path, manifest: Manifest) -> str:
    """Make `folder` a checkpoint. Returns the sha256 of the manifest's bytes, which names the
    checkpoint's content.

    Raises:
        OSError: the file system does not allow it; then there is no checkpoint, as far as it lets
            us see to that.
    """
    text = json.dumps(
        to_payload(asdict(manifest)), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False
    )
    content = text.encode() + b"\n"
    # The shards' names must be as durable as their bytes before the manifest vouches for them.
    sync_folder(folder)
    partial = folder / f"{MANIFEST}.partial"
    try:
        write_durably(partial, content)
        partial.replace(folder / MANIFEST)
        sync_folder(folder)
    except OSError:
        # An error means that there is no checkpoint, so there must be none: the rename may have
        # happened, and what failed is the folder's fsync behind it.
        for name in (MANIFEST, partial.name):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        raise
    return hashlib.sha256(content).hexdigest()


def retire_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or what a save that was never committed left. Safe to repeat after a
    crash.

    Raises:
        OSError: the file system does not allow it.
    """
    if not folder.exists():
        return
    # The manifest goes first, durably: without it the rest is rubbish that nobody can mistake for a
    # checkpoint.
    had = _unlinked(folder / MANIFEST)
    try:
        sync_folder(folder)
    except OSError:
        # A full disk may refuse it, and what was never a checkpoint gives its space back all the
        # same.
        if had:
            raise
    shutil.rmtree(folder)


def _unlinked(path: Path) -> bool:
    """Remove a file; whether it was there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
