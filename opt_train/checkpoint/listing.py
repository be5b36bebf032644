"""Every checkpoint folder of a run, the good and the rest, as `opt-train checkpoints` shows it. For
people: ranks list nothing, and restore what they are given by path and hash."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opt_train.checkpoint.manifest import MANIFEST, CheckpointError, check_sizes, read


@dataclass(frozen=True, slots=True)
class Listed:
    """One folder under `checkpoints/`, as a person may want to see it."""

    path: Path
    attempt: str
    step: int
    bytes: int
    """What its manifest vouches for; without a readable one, what lies there."""
    files: int
    why: str
    """Empty: it has a readable manifest and all files in their sizes. Otherwise what is wrong, in
    one sentence."""
    has_manifest: bool = True
    """Readable or not."""
    healthy: bool | None = None
    """`Manifest.healthy`; None: no manifest tells."""


def list_checkpoints(
    root: Path, committed: Mapping[Path, str] | None = None, *, files_here: bool = True
) -> tuple[Listed, ...]:
    """Every checkpoint folder in `root`, by attempt and step, the good and the rest. For people:
    ranks list nothing.

    Args:
        committed: sha256 of the manifests that were committed, by folder; another one there is not
            trusted.
        files_here: False where only the manifests lie in `root`, and agents hold the files.
    """
    found = []
    # A folder's name is no proof of a checkpoint: an unfinished save has one too.
    for folder in sorted(root.glob("*/step-*")):
        if folder.is_dir() and folder.name.removeprefix("step-").isdecimal():
            found.append(_listed(folder, (committed or {}).get(folder), files_here))
    return tuple(sorted(found, key=lambda item: (_numbers(item.attempt), item.step)))


def _listed(folder: Path, manifest_sha256: str | None, files_here: bool) -> Listed:
    attempt, step = folder.parent.name, int(folder.name.removeprefix("step-"))
    try:
        manifest = read(folder, manifest_sha256)
    except CheckpointError as error:
        there = (folder / MANIFEST).exists()
        why = "no manifest: it was never committed"
        if there or manifest_sha256 is not None:
            why = str(error)
        sizes = _sizes(folder)
        return Listed(folder, attempt, step, sum(sizes), len(sizes), why, there)
    why = ""
    try:
        if files_here:
            check_sizes(folder, manifest)
        if (manifest.attempt, manifest.step) != (attempt, step):
            why = (
                f"{folder / MANIFEST} is that of step {manifest.step} of attempt {manifest.attempt}"
            )
    except CheckpointError as error:
        why = str(error)
    return Listed(
        folder, attempt, step, manifest.bytes, len(manifest.files), why, healthy=manifest.healthy
    )


def _sizes(folder: Path) -> list[int]:
    """Of the files below `folder`; the run may be removing them meanwhile."""
    sizes = []
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file():
                sizes.append(file.stat().st_size)
    return sizes


def _numbers(attempt: str) -> tuple[int, ...]:
    """`12.9` before `12.10`; a name that is no attempt comes first."""
    with contextlib.suppress(ValueError):
        return tuple(int(part) for part in attempt.split("."))
    return ()
