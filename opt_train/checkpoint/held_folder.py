"""A folder that is held open, so that another in its place is not taken for it.

A person who removes a run directory means it, and may begin the run anew in its place while ranks
and agents of the old one still live: these must neither bring it back nor write into the new one.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path


class FolderReplacedError(Exception):
    """Another folder has come into the place of the one that is held."""


class HeldFolder:
    """The folder at a path as it was when this was made, and no other."""

    def __init__(self, path: Path) -> None:
        """Raises OSError: it is not there, or is no folder."""
        self._path = path
        # Open, so that its inode is nobody else's meanwhile, though it were removed.
        self._held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._held)

    def make_below(self, folder: Path) -> None:
        """Make a folder somewhere below it, which must not be there yet, and those between.

        Raises:
            FolderReplacedError: it would be below another.
            OSError: it cannot be made.
        """
        below = folder.relative_to(self._path)
        with self._opened() as root:
            _make(root, reversed(below.parents[:-1]))
            os.mkdir(below, dir_fd=root)

    def open_to_append(self, path: Path) -> int:
        """A descriptor of a file somewhere below it, made with the folders between if need be.

        Raises:
            FolderReplacedError: it would be below another.
            OSError: it cannot be had, perhaps for now.
        """
        below = path.relative_to(self._path)
        with self._opened() as root:
            _make(root, reversed(below.parents[:-1]))
            return os.open(
                below, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=root
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The folder that is at the path now, if it is the one that is held. Never the descriptor
        that is held: its handle may have gone stale since."""
        root = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._is(root):
                raise FolderReplacedError(f"{self._path} was removed, and another is in its place")
            yield root
        finally:
            os.close(root)

    def _is(self, other: int) -> bool:
        try:
            held = os.fstat(self._held)
        except OSError:  # stale: which of the two it is cannot be told, and the path is what counts
            return True
        return os.path.samestat(held, os.fstat(other))


def _make(root: int, folders: Iterator[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, dir_fd=root)
