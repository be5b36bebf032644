"""The files of snapshots that an agent keeps: in memory, which vanish with the agent, and on the
node's own disk.

Files in memory are the ranks' own, which the agent keeps open, or copies that it got from others.
Files on disk (see `placement.py`) outlive the agent. The store trusts neither: what is good is
found out by reading, against the manifest.
"""

import asyncio
import hashlib
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from opt_train.agent.snapshots.partial_file import PartialFile
from opt_train.agent.snapshots.placement import (
    PARTIAL,
    PATH_FORM,
    RESTORE,
    NodeFolder,
    SnapshotMissing,
    check_names,
    is_name,
    remove_file,
    remove_folder,
)
from opt_train.agent.snapshots.snapshot_file import PIECE_BYTES, OpenSnapshot, SnapshotFile
from opt_train.checkpoint.durable_file import write_durably
from opt_train.checkpoint.manifest import MANIFEST, FileEntry
from opt_train.host.worker_thread import WorkerThread
from opt_train.protocol.facts import SnapshotFiles

Key = tuple[str, str]
"""A checkpoint's path and a file's name."""

log = logging.getLogger(__name__)


class SnapshotStore:
    """The files that one agent keeps, by the checkpoint's path and the file's name. Used by the
    event loop's thread; whatever touches a file or a disk is given to `worker`, in order."""

    def __init__(self, directory: Path, below: PurePosixPath, worker: WorkerThread) -> None:
        """`directory` is the node's; all that the store makes lies in the folder `below` it, see
        `place_of`."""
        self._place = NodeFolder(directory, below)
        self._worker = worker
        self._files: dict[Key, SnapshotFile] = {}
        self._linked: set[Key] = set()

    @property
    def folder(self) -> Path:
        """The folder on the node's disk."""
        return self._place.path

    async def open(self) -> None:
        """Find the files that an earlier agent of this node left, and remove its link folders and
        half-written files.

        Raises:
            OSError: the folder is not this user's alone, or cannot be read.
        """
        self._files |= await self._worker.do(self._find)

    async def close(self) -> None:
        """Let everything go: nothing stays but what is on the node's disk."""
        keys = tuple(self._files)
        self._worker.do(remove_folder, self.folder / RESTORE)
        for key in keys:
            self._forget(key, keep=True)
        await self._worker.do(self._place.remove_empty, self.folder)

    # What there is --------------------------------------------------------------------------------

    def adopt(self, path: str, name: str, pid: int, fd: int, bytes: int, sha256: str) -> None:
        """Keep what process `pid` has open as `fd`: `bytes` of memory, which stay when the process
        is gone.

        A rank uses the same memory again for a later snapshot: the earlier one is not kept from
        then on.

        Raises:
            OSError: the process is gone, or has no such descriptor.
            SnapshotMissing: it is no file of that size, or path or name are malformed.
        """
        check_names(path, name)
        # Without O_NONBLOCK a planted pipe would stop the event loop here.
        descriptor = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != bytes:
            os.close(descriptor)
            raise SnapshotMissing(
                f"{name} has {status.st_size} bytes in the rank's memory instead of {bytes}"
            )
        inode = (status.st_dev, status.st_ino)
        for key in [
            key for key, file in self._files.items() if file.inode == inode and key[0] != path
        ]:
            self._forget(key)
        self._put((path, name), SnapshotFile(bytes, descriptor, sha256=sha256, inode=inode))

    def files(self) -> tuple[SnapshotFiles, ...]:
        """All files by checkpoint, good or not."""
        names = defaultdict(list)
        for path, name in sorted(self._files):
            names[path].append(name)
        return tuple(SnapshotFiles(path, tuple(found)) for path, found in names.items())

    def has(self, path: str, name: str) -> bool:
        """Whether the file is kept, good or not."""
        return (path, name) in self._files

    def small_file(self, path: str, name: str, most_bytes: int) -> bytes:
        """The content of a file in memory, at once.

        Raises:
            SnapshotMissing: it is not in memory, or larger than `most_bytes`.
        """
        file = self._files.get((path, name))
        if file is None or file.descriptor < 0:
            raise SnapshotMissing(f"{name} of {path} is not in memory")
        if file.bytes > most_bytes:
            raise SnapshotMissing(
                f"{name} of {path} has {file.bytes} bytes; {most_bytes} at most were expected"
            )
        return os.pread(file.descriptor, most_bytes, 0)

    def reading(self, path: str, name: str) -> OpenSnapshot:
        """The file for reading: ``async with store.reading(path, name) as file``."""
        return OpenSnapshot(self._files.get((path, name)), f"{name} of {path}", self._worker)

    async def is_good(self, path: str, name: str, entry: FileEntry) -> bool:
        """Whether the file is kept with these very bytes: all are read. One that is not good is not
        kept any more."""
        file = self._files.get((path, name))
        if file is None:
            return False
        good = file.may_be(entry) and await self._has_hash(path, name, entry)
        if self._files.get((path, name)) is not file:
            return False  # dropped or replaced meanwhile
        if not good:
            log.warning("%s of %s is not what the manifest names: not kept any more", name, path)
            self._forget((path, name))
        return good

    def forget(self, path: str, names: Collection[str]) -> None:
        """Keep these files of a checkpoint no longer."""
        for name in names:
            self._forget((path, name))

    def drop(self, path: str) -> "asyncio.Future[None]":
        """Keep nothing of a checkpoint, from now on; its memory and disk are free when the result
        is done."""
        if not PATH_FORM.fullmatch(path):
            raise SnapshotMissing(f"{path!r} is no checkpoint that agents hold")
        for key in [key for key in self._files if key[0] == path]:
            self._forget(key, keep=True)  # the folders go as a whole
        return self._worker.do(self._remove_folders, path)

    # What is added --------------------------------------------------------------------------------

    def partial_file(self, path: str, name: str, entry: FileEntry) -> PartialFile:
        """A file to be written: ``async with store.partial_file(...) as partial``. It is kept only
        after `PartialFile.commit`."""
        check_names(path, name)
        return PartialFile(
            self._place, path, name, entry, self._worker, lambda file: self._put((path, name), file)
        )

    async def link(self, path: str, names: Collection[str], manifest: bytes) -> str:
        """A folder in which ranks of this node find these files and `manifest.json`. Returns its
        path.

        Raises:
            SnapshotMissing: one of them is not kept.
            OSError: the node's disk does not allow it.
        """
        targets = {}
        for name in names:
            file = self._files.get((path, name))
            if file is None:
                raise SnapshotMissing(f"{name} of {path} is not held any more")
            targets[name] = file.opened_as
            self._linked.add((path, name))
        folder = self.folder / RESTORE / path
        await self._worker.do(self._make_links, folder, targets, manifest)
        return str(folder)

    # Bookkeeping: in the loop's thread; what touches files is given to the worker, in this order --

    def _put(self, key: Key, file: SnapshotFile) -> None:
        old = self._files.get(key)
        # Of a file on disk the new one has taken the place already.
        self._forget(key, keep=old is not None and file.file is not None and old.file == file.file)
        self._files[key] = file

    def _forget(self, key: Key, keep: bool = False) -> None:
        """`keep`: a file on disk stays there."""
        file = self._files.pop(key, None)
        if file is None:
            return
        if key in self._linked:
            # Before the descriptor: its number may be that of another file soon.
            self._linked.discard(key)
            self._worker.do(remove_file, self.folder / RESTORE / key[0] / key[1])
        if file.file is None:
            self._worker.do(os.close, file.descriptor)  # frees the memory, which takes its time
        elif not keep:
            self._worker.do(remove_file, file.file)

    async def _has_hash(self, path: str, name: str, entry: FileEntry) -> bool:
        digest, offset = hashlib.sha256(), 0
        try:
            async with self.reading(path, name) as file:
                if file.bytes != entry.bytes:
                    return False
                # A piece at a time, so that the worker does what others wait for in between.
                while count := await self._worker.do(_hash_piece, file.descriptor, offset, digest):
                    offset += count
        except (SnapshotMissing, OSError) as trouble:
            log.warning("%s of %s cannot be read: %s", name, path, trouble)
            return False
        return digest.hexdigest() == entry.sha256

    # In the worker thread -------------------------------------------------------------------------

    def _find(self) -> dict[Key, SnapshotFile]:
        if not self.folder.exists():
            return {}
        self._place.make(self.folder)
        remove_folder(self.folder / RESTORE)
        found = {}
        for file in sorted(self.folder.glob("node/*/step-*/*")):
            path, name = file.parent.relative_to(self.folder).as_posix(), file.name
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or not PATH_FORM.fullmatch(path):
                continue
            if name.endswith(PARTIAL) and is_name(name.removesuffix(PARTIAL)):
                file.unlink()
            elif is_name(name):
                found[path, name] = SnapshotFile(status.st_size, file=file)
        return found

    def _make_links(self, folder: Path, targets: Mapping[str, str], manifest: bytes) -> None:
        self._place.make(folder)
        partial = folder / f"{MANIFEST}{PARTIAL}"
        write_durably(partial, manifest)
        partial.replace(folder / MANIFEST)
        for name, target in targets.items():
            partial = folder / f"{name}{PARTIAL}"
            partial.unlink(missing_ok=True)
            partial.symlink_to(target)
            partial.replace(folder / name)

    def _remove_folders(self, path: str) -> None:
        for folder in (self.folder / RESTORE / path, self.folder / path):
            remove_folder(folder)
            self._place.remove_empty(folder.parent)


def _hash_piece(descriptor: int, offset: int, digest: "hashlib._Hash") -> int:
    piece = os.pread(descriptor, PIECE_BYTES, offset)
    digest.update(piece)
    return len(piece)
