"""A file of a snapshot that is being written, in memory or on the node's disk."""

import asyncio
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from opt_train.agent.snapshots.placement import PARTIAL, NodeFolder, SnapshotMissing, remove_file
from opt_train.agent.snapshots.snapshot_file import PIECE_BYTES, OpenSnapshot, SnapshotFile
from opt_train.checkpoint.durable_file import sync_folder
from opt_train.checkpoint.manifest import FileEntry
from opt_train.host.worker_thread import WorkerThread

MEMORY_RESERVE_BYTES = 256 << 20
"""No copy is made in memory that would leave the node less. Files in memory count as the node's
memory and cannot be paged out: what the kernel then ends to make room is a rank."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What was verified once stays as it is, whoever opens it."""


class PartialFile:
    """A file that is being written, hashed on the way. Unless it is committed, nothing of it
    stays."""

    def __init__(
        self,
        folder: NodeFolder,
        path: str,
        name: str,
        entry: FileEntry,
        worker: WorkerThread,
        keep: Callable[[SnapshotFile], None],
    ) -> None:
        """`entry` is what the manifest names; `keep` takes the file that proved to be that."""
        self._folder, self._path, self._name = folder, path, name
        self._entry, self._worker, self._keep = entry, worker, keep
        self._file = folder.path / path / name if path.startswith("node/") else None
        self._descriptor = -1
        self._digest = hashlib.sha256()
        self._written = 0

    async def __aenter__(self) -> Self:
        """Raises OSError if there is no room to begin."""
        try:
            await self._worker.do(self._open)
        except BaseException:
            self._worker.do(self._discard)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._worker.do(self._discard)

    def write(self, piece: bytes) -> "asyncio.Future[int]":
        """Append `piece`; the result is its length. Raises OSError, of the result, on a full disk
        for example."""
        return self._worker.do(self._append, piece)

    async def copy(self, file: OpenSnapshot) -> None:
        """Append all of `file`. Raises OSError if it cannot be read or written."""
        offset = 0
        while count := await self._worker.do(self._append_from, file, offset):
            offset += count

    async def commit(self) -> None:
        """Keep it, durable if it is on disk.

        Raises:
            SnapshotMissing: it has other bytes than the manifest names.
            OSError: the disk does not take it.
        """
        if (self._written, self._digest.hexdigest()) != (self._entry.bytes, self._entry.sha256):
            raise SnapshotMissing(
                f"{self._name} of {self._path} came with other bytes than the manifest names"
            )
        self._keep(await self._worker.do(self._finish))
        self._descriptor = -1

    # In the worker thread -------------------------------------------------------------------------

    def _open(self) -> None:
        if self._file is None:
            if self._entry.bytes + MEMORY_RESERVE_BYTES > _available_memory():
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            self._descriptor = os.memfd_create("opt_train", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            return
        self._folder.make(self._file.parent)
        self._descriptor = os.open(
            self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )

    @property
    def _partial(self) -> str:
        return f"{self._file}{PARTIAL}"

    def _append(self, piece: bytes) -> int:
        self._digest.update(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._written += len(piece)
        return len(piece)

    def _append_from(self, file: OpenSnapshot, offset: int) -> int:
        return self._append(os.pread(file.descriptor, PIECE_BYTES, offset))

    def _finish(self) -> SnapshotFile:
        if self._file is None:
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return SnapshotFile(self._written, self._descriptor, sha256=self._entry.sha256)
        # The bytes before the name, and the name before anybody counts on it.
        os.fsync(self._descriptor)
        Path(self._partial).replace(self._file)
        sync_folder(self._file.parent)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        return SnapshotFile(self._written, file=self._file, sha256=self._entry.sha256)

    def _discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._file is not None:
                remove_file(Path(self._partial))
                self._folder.remove_empty(self._file.parent)


def _available_memory() -> int:
    """Bytes of memory that the node could give, as the kernel estimates."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
