"""One file of a snapshot as an agent has it, and that file open for reading."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from opt_train.agent.snapshots.placement import SnapshotMissing
from opt_train.checkpoint.manifest import FileEntry
from opt_train.host.worker_thread import WorkerThread

PIECE_BYTES = 1 << 22
"""Files are read, hashed and written in pieces of this size."""


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotFile:
    """One file: in memory by `descriptor`, or on disk as `file`. `sha256` is what the rank claimed;
    empty: unknown."""

    bytes: int
    descriptor: int = -1
    file: Path | None = None
    sha256: str = ""
    inode: tuple[int, int] = (0, 0)

    @property
    def opened_as(self) -> str:
        """A path that opens it, as long as it is kept."""
        # A memfd has no name, but whoever opens it through /proc gets a position of its own.
        if self.file is None:
            return f"/proc/{os.getpid()}/fd/{self.descriptor}"
        return str(self.file)

    def may_be(self, entry: FileEntry) -> bool:
        """Whether size and hash, as far as they are known without reading, are those of `entry`."""
        return self.bytes == entry.bytes and self.sha256 in ("", entry.sha256)


class OpenSnapshot:
    """One file, open for reading on a descriptor of its own: whatever becomes of the store's."""

    def __init__(self, file: SnapshotFile | None, what: str, worker: WorkerThread) -> None:
        self._file, self._what, self._worker = file, what, worker
        self.descriptor = -1
        self.bytes = 0

    @property
    def in_memory(self) -> bool:
        return self._file is not None and self._file.file is None

    def may_be(self, entry: FileEntry) -> bool:
        """Whether size and hash, as far as they are known without reading, are those of `entry`."""
        return self._file is not None and self._file.may_be(entry)

    async def __aenter__(self) -> Self:
        """Raises `SnapshotMissing` if it is not kept, OSError if it cannot be opened."""
        if self._file is None:
            raise SnapshotMissing(f"{self._what} is not held")
        try:
            # Given to the worker thread before the store can let go of it.
            await self._worker.do(self._open, self._file.opened_as)
        except BaseException:
            self._worker.do(self._close)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._worker.do(self._close)

    async def piece(self, offset: int) -> bytes:
        """At most `PIECE_BYTES` from `offset`; none at the end."""
        return await self._worker.do(os.pread, self.descriptor, PIECE_BYTES, offset)

    def _open(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.bytes = os.fstat(self.descriptor).st_size

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
