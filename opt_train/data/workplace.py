"""A folder that is filled beside its final place and renamed there whole."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Workplace:
    """The folder being filled. One process at a time holds it; what a crashed one left in it is cleared first."""

    path: Path

    @classmethod
    @contextlib.contextmanager
    def beside(cls, directory: Path, progress: Callable[[str], None]) -> Iterator[Self]:
        """The workplace of `directory`, empty and locked; what is left in it at the end is removed.

        Raises:
            OSError: the file system does not allow it.
        """
        path = directory.with_name(f"{directory.name}.partial")
        directory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, progress)
        try:
            _clear(path)
            yield cls(path)
        finally:
            # After the rename another process may have made a new folder of this name: ours alone may be removed.
            if _is_at(descriptor, path):
                shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def rename_to(self, directory: Path) -> None:
        """Put the folder, whose files the caller has fsynced, into its final place, durably."""
        sync_folder(self.path)
        self.path.rename(directory)
        sync_folder(directory.parent)


def sync_folder(path: Path) -> None:
    """fsync the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(path: Path, progress: Callable[[str], None]) -> int:
    """Make `path` if need be and lock it; the descriptor that holds the lock. A crash frees the lock."""
    while True:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that is filling {path}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The one we waited for has renamed or removed the folder: then ours is no longer what stands at `path`.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clear(path: Path) -> None:
    for item in path.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
