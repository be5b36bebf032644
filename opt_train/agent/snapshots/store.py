"""What an agent holds of checkpoints: files in memory, which vanish with the agent, and on the
node's own disk.

Files in memory are the ranks' own, which the agent keeps open, or copies that it got from others. A
file on disk is `<node directory>/opt_train-<uid>/<run>/<node>/node/<attempt>/step-<step>/<name>`,
and outlives the agent. The shelf itself trusts neither: what is good is found out by reading,
against the manifest.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from opt_train.checkpoint.durable_file import sync_folder, write_durably
from opt_train.checkpoint.manifest import MANIFEST, FileEntry
from opt_train.host.processes import mark_of
from opt_train.host.worker_thread import WorkerThread
from opt_train.protocol.facts import HeldFiles

PIECE_BYTES = 1 << 22
"""Files are read, hashed and written in pieces of this size."""
MEMORY_SPARED_BYTES = 256 << 20
"""No copy is made in memory that would leave the node less: the kernel would end a rank for it."""
PATH_FORM = re.compile(r"(memory|node)/[0-9]{1,9}\.[0-9]{1,9}/step-[0-9]{8,18}")
NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_PARTIAL = ".partial"
_RESTORE = "restore"
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What was verified once stays as it is, whoever opens it."""

log = logging.getLogger(__name__)


class SnapshotMissing(Exception):
    """A file that cannot be held, or that a source does not give. One sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """One file: in memory by `descriptor`, or on disk as `file`. `sha256` is what the rank said;
    empty: unknown."""

    bytes: int
    descriptor: int = -1
    file: Path | None = None
    sha256: str = ""
    inode: tuple[int, int] = (0, 0)

    @property
    def opened_as(self) -> str:
        """A path that opens it, as long as it is held."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}" if self.file is None else str(self.file)


class SnapshotStore:
    """The files that one agent holds, by the checkpoint's path and the file's name. Used by the
    event loop's thread."""

    def __init__(self, directory: Path, below: PurePosixPath, helper: WorkerThread) -> None:
        """`directory` is the node's; all that the shelf makes lies in the folder `below` it, see
        `place_of`."""
        self._directory, self._below = directory, below
        self.folder = directory / below
        self._helper = helper
        self._held: dict[tuple[str, str], _Held] = {}
        self._linked: set[tuple[str, str]] = set()

    async def open(self) -> None:
        """Find the files that an earlier agent of this node left, and remove its link folders and
        half-written files.

        Raises:
            OSError: the folder is not this user's alone, or cannot be read.
        """
        self._held |= await self._helper.do(self._find)

    async def close(self) -> None:
        """Let everything go: nothing stays but what is on the node's disk."""
        keys = tuple(self._held)
        self._helper.do(_remove, self.folder / _RESTORE)
        for key in keys:
            self._forget(key, keep=True)
        await self._helper.do(self._remove_empty, self.folder)

    # What is held ---------------------------------------------------------------------------------

    def take(self, path: str, name: str, pid: int, fd: int, bytes: int, sha256: str) -> None:
        """Hold what process `pid` has open as `fd`: `bytes` of memory, which stay when the process
        is gone.

        A rank takes the same memory again for a later snapshot: the earlier one is not held from
        then on.

        Raises:
            OSError: the process is gone, or has no such descriptor.
            NotHeld: it is no file of that size, or path or name are malformed.
        """
        check_words(path, name)
        descriptor = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != bytes:
            os.close(descriptor)
            raise SnapshotMissing(
                f"{name} has {status.st_size} bytes in the rank's memory instead of {bytes}"
            )
        inode = (status.st_dev, status.st_ino)
        for key in [
            key for key, held in self._held.items() if held.inode == inode and key[0] != path
        ]:
            self._forget(key)
        self._put((path, name), _Held(bytes, descriptor, sha256=sha256, inode=inode))

    def held(self) -> tuple[HeldFiles, ...]:
        """All files by checkpoint, good or not."""
        names = defaultdict(list)
        for path, name in sorted(self._held):
            names[path].append(name)
        return tuple(HeldFiles(path, tuple(found)) for path, found in names.items())

    def holds(self, path: str, name: str) -> bool:
        """Whether the file is held, good or not."""
        return (path, name) in self._held

    def small_file(self, path: str, name: str, most_bytes: int) -> bytes:
        """The content of a file in memory, at once.

        Raises:
            NotHeld: it is not in memory, or larger than `most_bytes`.
        """
        held = self._held.get((path, name))
        if held is None or held.descriptor < 0:
            raise SnapshotMissing(f"{name} of {path} is not in memory")
        if held.bytes > most_bytes:
            raise SnapshotMissing(
                f"{name} of {path} has {held.bytes} bytes; {most_bytes} at most were expected"
            )
        return os.pread(held.descriptor, most_bytes, 0)

    def reading(self, path: str, name: str) -> "OpenSnapshot":
        """The file for reading: ``async with shelf.reading(path, name) as file``."""
        return OpenSnapshot(self._held.get((path, name)), f"{name} of {path}", self._helper)

    async def is_good(self, path: str, name: str, entry: FileEntry) -> bool:
        """Whether the file is held with these very bytes: all are read. One that is not good is not
        held any more."""
        held = self._held.get((path, name))
        if held is None:
            return False
        good = _may_be(held, entry) and await self._has_hash(path, name, entry)
        if self._held.get((path, name)) is not held:
            return False  # dropped or replaced meanwhile
        if not good:
            log.warning("%s of %s is not what the manifest names: not held any more", name, path)
            self._forget((path, name))
        return good

    def let_go(self, path: str, names: Collection[str]) -> None:
        """Hold these files of a checkpoint no longer."""
        for name in names:
            self._forget((path, name))

    def drop(self, path: str) -> "asyncio.Future[None]":
        """Hold nothing of a checkpoint, from now on; its memory and disk are free when the result
        is done."""
        if not PATH_FORM.fullmatch(path):
            raise SnapshotMissing(f"{path!r} is no checkpoint that agents hold")
        for key in [key for key in self._held if key[0] == path]:
            self._forget(key, keep=True)  # the folders go as a whole
        return self._helper.do(self._remove_folders, path)

    # What is added --------------------------------------------------------------------------------

    def draft(self, path: str, name: str, entry: FileEntry) -> "PartialFile":
        """A file to be written: ``async with shelf.draft(...) as draft``. It is held only after
        `PartialFile.shelve`."""
        check_words(path, name)
        return PartialFile(self, path, name, entry, self._helper)

    async def link(self, path: str, names: Collection[str], manifest: bytes) -> str:
        """A folder in which ranks of this node find these files and `manifest.json`. Returns its
        path.

        Raises:
            NotHeld: one of them is not held.
            OSError: the node's disk does not allow it.
        """
        targets = {}
        for name in names:
            held = self._held.get((path, name))
            if held is None:
                raise SnapshotMissing(f"{name} of {path} is not held any more")
            targets[name] = held.opened_as
            self._linked.add((path, name))
        folder = self.folder / _RESTORE / path
        await self._helper.do(self._make_links, folder, targets, manifest)
        return str(folder)

    # Bookkeeping: in the loop's thread; what touches files is given to the helper, in this order --

    def _put(self, key: tuple[str, str], held: _Held) -> None:
        old = self._held.get(key)
        # Of a file on disk the new one has taken the place already.
        self._forget(key, keep=old is not None and held.file is not None and old.file == held.file)
        self._held[key] = held

    def _forget(self, key: tuple[str, str], keep: bool = False) -> None:
        """`keep`: a file on disk stays there."""
        held = self._held.pop(key, None)
        if held is None:
            return
        if key in self._linked:
            # Before the descriptor: its number may be that of another file soon.
            self._linked.discard(key)
            self._helper.do(_unlink, self.folder / _RESTORE / key[0] / key[1])
        if held.file is None:
            self._helper.do(os.close, held.descriptor)  # frees the memory, which takes its time
        elif not keep:
            self._helper.do(_unlink, held.file)

    async def _has_hash(self, path: str, name: str, entry: FileEntry) -> bool:
        digest, offset = hashlib.sha256(), 0
        try:
            async with self.reading(path, name) as file:
                if file.bytes != entry.bytes:
                    return False
                while count := await self._helper.do(_hash_piece, file.descriptor, offset, digest):
                    offset += count
        except (SnapshotMissing, OSError) as trouble:
            log.warning("%s of %s cannot be read: %s", name, path, trouble)
            return False
        return digest.hexdigest() == entry.sha256

    # In the helper's thread -----------------------------------------------------------------------

    def _find(self) -> dict[tuple[str, str], _Held]:
        if not self.folder.exists():
            return {}
        self._make_folder(self.folder)
        _remove(self.folder / _RESTORE)
        found = {}
        for file in sorted(self.folder.glob("node/*/step-*/*")):
            path, name = file.parent.relative_to(self.folder).as_posix(), file.name
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or not PATH_FORM.fullmatch(path):
                continue
            if name.endswith(_PARTIAL) and _is_name(name.removesuffix(_PARTIAL)):
                file.unlink()
            elif _is_name(name):
                found[path, name] = _Held(status.st_size, file=file)
        return found

    def _make_folder(self, folder: Path) -> None:
        """Make `folder`, and what of `self.folder` is missing, for this user alone."""
        for _ in range(4):
            with contextlib.suppress(FileNotFoundError):
                # A neighbour that leaves may remove an empty folder between two lines: then once
                # more.
                return self._make_folder_once(folder)
        self._make_folder_once(folder)

    def _make_folder_once(self, folder: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        made = self._directory
        for part in folder.relative_to(self._directory).parts:
            made /= part
            with contextlib.suppress(FileExistsError):
                made.mkdir(mode=0o700)
                sync_folder(made.parent)
            status = made.lstat()
            if (
                not stat.S_ISDIR(status.st_mode)
                or status.st_uid != os.getuid()
                or status.st_mode & 0o077
            ):
                raise PermissionError(errno.EPERM, "not a folder of this user alone", str(made))

    def _make_links(self, folder: Path, targets: Mapping[str, str], manifest: bytes) -> None:
        self._make_folder(folder)
        partial = folder / f"{MANIFEST}{_PARTIAL}"
        write_durably(partial, manifest)
        partial.replace(folder / MANIFEST)
        for name, target in targets.items():
            partial = folder / f"{name}{_PARTIAL}"
            partial.unlink(missing_ok=True)
            partial.symlink_to(target)
            partial.replace(folder / name)

    def _remove_folders(self, path: str) -> None:
        for folder in (self.folder / _RESTORE / path, self.folder / path):
            _remove(folder)
            self._remove_empty(folder.parent)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._directory:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = folder.parent


class OpenSnapshot:
    """One held file, open for reading on a descriptor of its own: whatever becomes of the
    shelf's."""

    def __init__(self, held: _Held | None, what: str, helper: WorkerThread) -> None:
        self._held, self._what, self._helper = held, what, helper
        self.descriptor = -1
        self.bytes = 0

    @property
    def in_memory(self) -> bool:
        return self._held is not None and self._held.file is None

    def may_be(self, entry: FileEntry) -> bool:
        """Whether size and hash, as far as they are known without reading, are those of `entry`."""
        return self._held is not None and _may_be(self._held, entry)

    async def __aenter__(self) -> Self:
        """Raises `SnapshotMissing` if it is not held, OSError if it cannot be opened."""
        if self._held is None:
            raise SnapshotMissing(f"{self._what} is not held")
        try:
            # Given to the helper before the shelf can let go of it.
            await self._helper.do(self._open, self._held.opened_as)
        except BaseException:
            self._helper.do(self._close)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._helper.do(self._close)

    async def piece(self, offset: int) -> bytes:
        """At most `PIECE_BYTES` from `offset`; none at the end."""
        return await self._helper.do(os.pread, self.descriptor, PIECE_BYTES, offset)

    def _open(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.bytes = os.fstat(self.descriptor).st_size

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class PartialFile:
    """A file that is being written, hashed on the way. Unless it is shelved, nothing of it
    stays."""

    def __init__(
        self, shelf: SnapshotStore, path: str, name: str, entry: FileEntry, helper: WorkerThread
    ) -> None:
        self._shelf, self._path, self._name, self._entry, self._helper = (
            shelf,
            path,
            name,
            entry,
            helper,
        )
        self._file = shelf.folder / path / name if path.startswith("node/") else None
        self._descriptor = -1
        self._digest = hashlib.sha256()
        self._written = 0

    async def __aenter__(self) -> Self:
        """Raises OSError if there is no room to begin."""
        try:
            await self._helper.do(self._open)
        except BaseException:
            self._helper.do(self._discard)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._helper.do(self._discard)

    def write(self, piece: bytes) -> "asyncio.Future[int]":
        """Append `piece`; the result is its length. Raises OSError, of the result, on a full disk
        for example."""
        return self._helper.do(self._append, piece)

    async def copy(self, file: OpenSnapshot) -> None:
        """Append all of `file`. Raises OSError if it cannot be read or written."""
        offset = 0
        while count := await self._helper.do(self._append_from, file, offset):
            offset += count

    async def shelve(self) -> None:
        """Hold it, durable if it is on disk.

        Raises:
            NotHeld: it has other bytes than the manifest names.
            OSError: the disk does not take it.
        """
        if (self._written, self._digest.hexdigest()) != (self._entry.bytes, self._entry.sha256):
            raise SnapshotMissing(
                f"{self._name} of {self._path} came with other bytes than the manifest names"
            )
        held = await self._helper.do(self._finish)
        self._shelf._put((self._path, self._name), held)
        self._descriptor = -1

    # In the helper's thread -----------------------------------------------------------------------

    def _open(self) -> None:
        if self._file is None:
            if self._entry.bytes + MEMORY_SPARED_BYTES > _available_memory():
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            self._descriptor = os.memfd_create("opt_train", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            return
        self._shelf._make_folder(self._file.parent)
        self._descriptor = os.open(
            self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )

    @property
    def _partial(self) -> str:
        return f"{self._file}{_PARTIAL}"

    def _append(self, piece: bytes) -> int:
        self._digest.update(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._written += len(piece)
        return len(piece)

    def _append_from(self, file: OpenSnapshot, offset: int) -> int:
        return self._append(os.pread(file.descriptor, PIECE_BYTES, offset))

    def _finish(self) -> _Held:
        if self._file is None:
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return _Held(self._written, self._descriptor, sha256=self._entry.sha256)
        os.fsync(self._descriptor)
        Path(self._partial).replace(self._file)
        sync_folder(self._file.parent)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        return _Held(self._written, file=self._file, sha256=self._entry.sha256)

    def _discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._file is not None:
                _unlink(Path(self._partial))
                self._shelf._remove_empty(self._file.parent)


def place_of(run_directory: Path, node: str) -> PurePosixPath:
    """Where, below a node's directory, the shelf of `node` keeps what it has of a run: the run's
    mark as file names."""
    mark = hashlib.sha256(os.fsencode(mark_of(run_directory, ""))).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", run_directory.resolve().name)[:64]
    return PurePosixPath(f"opt_train-{os.getuid()}", f"{readable}-{mark}", node)


def directory_of(configured: str) -> Path:
    """`checkpoint.node_directory`; empty: the folder of temporary files."""
    return Path(configured or tempfile.gettempdir()).expanduser().resolve()


def check_words(path: str, name: str) -> None:
    """Raises `SnapshotMissing` if these are no names of a checkpoint that agents hold and a file in
    it."""
    if not PATH_FORM.fullmatch(path):
        raise SnapshotMissing(f"{path!r} is no checkpoint that agents hold")
    if not _is_name(name):
        raise SnapshotMissing(f"{name!r} is no name of a checkpoint's file")


def _is_name(name: str) -> bool:
    return (
        NAME_FORM.fullmatch(name) is not None and name != MANIFEST and not name.endswith(_PARTIAL)
    )


def _may_be(held: _Held, entry: FileEntry) -> bool:
    return held.bytes == entry.bytes and held.sha256 in ("", entry.sha256)


def _available_memory() -> int:
    """Bytes of memory that the node could give, as the kernel estimates."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _hash_piece(descriptor: int, offset: int, digest: "hashlib._Hash") -> int:
    piece = os.pread(descriptor, PIECE_BYTES, offset)
    digest.update(piece)
    return len(piece)


def _unlink(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s cannot be removed: %s", file, error.strerror)


def _remove(folder: Path) -> None:
    """Remove a folder with all in it; links in it, not what they name."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.error("%s cannot be removed: %s", folder, error.strerror)
