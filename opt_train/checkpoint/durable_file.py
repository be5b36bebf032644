"""Files and names that outlive a loss of power: nothing counts that is not fsynced.

torch's `HuggingFaceStorageWriter` does not fsync: the rename of a manifest could survive a crash
that its shards did not. Standard library only.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIECE_BYTES = 1 << 26
"""Progress is reported, and bytes are made durable, in pieces of about this size."""


class DurableFile:
    """A new file, written once from front to back, hashed as it is written and durable when it is
    closed.

    One that is there already is an error: two that write into one file make it neither's.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Open it.

        Args:
            progress: called with the durable bytes now and then.
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
            self._report(self.size)
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
        # Now and then: what is reported is then on the disk, and never stands still for one long
        # fsync, which a supervisor would take for a hang. While the disk takes these, the next are
        # copied into the system's memory.
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
            self._report(synced[0])

    def _report(self, durable: int) -> None:
        if self._progress is not None:
            self._progress(durable)


def write_durably(path: Path, content: bytes) -> None:
    """Write and fsync a file.

    Raises:
        OSError: the file system does not allow it.
    """
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """fsync the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the file system say that it is about `path`: what fails on a descriptor names
    no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
