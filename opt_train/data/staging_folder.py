"""A folder that is filled beside its final place and renamed there whole.

A rename within one file system is atomic, so a reader finds the finished folder or none. One
process at a time fills it, by a lock on the folder itself: a lock file would be left behind by a
crash, an flock is not.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from opt_train.data.document_index import RECORDS_FILE, SOURCES_FILE
from opt_train.data.manifest import DATASET_FILE, SPLITS, TOKENIZER_FILE
from opt_train.protocol.exits import BadInput

_WRITTEN = re.compile(
    rf"{re.escape(TOKENIZER_FILE)}|{re.escape(DATASET_FILE)}|"
    rf"{re.escape(SOURCES_FILE)}|{re.escape(RECORDS_FILE)}|"
    rf"({'|'.join(SPLITS)}|set-[a-z0-9_-]+)-\d{{5,}}\.bin"
)
"""The files that `prepare` fills the folder with: nothing else is ever removed from one."""


@dataclass(frozen=True, slots=True)
class StagingFolder:
    """The folder being filled. One process at a time holds it; what a crashed one left in it is
    cleared first."""

    path: Path

    @classmethod
    @contextlib.contextmanager
    def beside(cls, directory: Path, progress: Callable[[str], None]) -> Iterator[Self]:
        """The staging folder of `directory`, empty and locked; what is left in it at the end is
        removed.

        Raises:
            BadInput: something that `prepare` does not write stands in it.
            OSError: the file system does not allow it.
        """
        path = directory.with_name(f"{directory.name}.partial")
        directory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, progress)
        try:
            _clear(path)
            yield cls(path)
        finally:
            # After the rename another process may have made a new folder of this name: ours alone
            # may be removed.
            if _is_at(descriptor, path):
                with contextlib.suppress(OSError, BadInput):
                    _clear(path)
                    path.rmdir()
            os.close(descriptor)

    def rename_to(self, directory: Path) -> None:
        """Put the folder, whose files the caller has fsynced, into its final place, durably."""
        sync_folder(self.path)
        self.path.rename(directory)
        sync_folder(directory.parent)

    def move_into(self, directory: Path, names: Iterable[str]) -> None:
        """Put files, which the caller has fsynced, into a finished folder, durably, one after the
        other."""
        for name in names:
            (self.path / name).rename(directory / name)
            sync_folder(directory)


def sync_folder(path: Path) -> None:
    """fsync the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(path: Path, progress: Callable[[str], None]) -> int:
    """Make `path` if need be and lock it; the descriptor that holds the lock. A crash frees the
    lock."""
    while True:
        path.mkdir(exist_ok=True)
        # NOFOLLOW: a link planted at this name must not have us lock, and later clear, another
        # folder.
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that is filling {path}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The one we waited for has renamed or removed the folder: then ours is no longer what
        # stands at `path`.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clear(path: Path) -> None:
    items = sorted(path.iterdir())
    for item in items:
        if not _WRITTEN.fullmatch(item.name) or item.is_symlink() or not item.is_file():
            raise BadInput(
                f"{path}, where the data is prepared, holds {item.name}, which `opt-train "
                "prepare` did not write; "
                "move that folder away or name another data.directory"
            )
    for item in items:
        item.unlink()
