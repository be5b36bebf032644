"""What the tests of snapshots share: contents, stores, and processes that have files in
their memory."""

import asyncio
import contextlib
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

from opt_train.agent.snapshots.placement import place_of
from opt_train.agent.snapshots.store import SnapshotStore
from opt_train.checkpoint.manifest import FileEntry
from opt_train.host.worker_thread import WorkerThread

MEMORY, NODE = "memory/1.00/step-00000005", "node/1.00/step-00000005"

_CHILD = """
import os, sys
descriptor = os.memfd_create("snapshot")
os.write(descriptor, bytes.fromhex(sys.stdin.readline()))
print(descriptor, flush=True)
for line in sys.stdin:
    os.pwrite(descriptor, bytes.fromhex(line), 0)
    print("written", flush=True)
"""


def content(seed: int, size: int = 10_000_000) -> bytes:
    """Two pieces and a part of one, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def entry(of: bytes) -> FileEntry:
    return FileEntry(len(of), hashlib.sha256(of).hexdigest())


def play(scene: Coroutine[Any, Any, None], seconds: float = 50.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scene

    asyncio.run(bounded())


class Child:
    """A process with `content` in its memory, as a rank has its snapshot."""

    def __init__(self, content: bytes) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.fd = int(self._ask(content))
        self.pid = self.process.pid

    def overwrite(self, content: bytes) -> None:
        assert self._ask(content) == "written\n"

    def _ask(self, content: bytes) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(content.hex() + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def child(content: bytes) -> Iterator[Child]:
    made = Child(content)
    try:
        yield made
    finally:
        made.kill()


@contextlib.asynccontextmanager
async def store_in(directory: Path, node: str = "node-1") -> AsyncIterator[SnapshotStore]:
    worker = WorkerThread()
    store = SnapshotStore(directory, place_of(Path("/runs/demo"), node), worker)
    await store.open()
    try:
        yield store
    finally:
        await store.close()
        worker.close()


async def put(
    store: SnapshotStore, path: str, name: str, data: bytes, expected: FileEntry | None = None
) -> None:
    """Have `data` in the store, if it is what is expected."""
    async with store.partial_file(path, name, expected or entry(data)) as partial_file:
        await partial_file.write(data)
        await partial_file.commit()


def names(store: SnapshotStore) -> dict[str, tuple[str, ...]]:
    return {held.path: held.names for held in store.files()}


def memory_descriptors(pid: int) -> int:
    """How many files in memory a process has open."""
    count = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{pid}/fd/{number}").startswith("/memfd:")
    return count


def files_below(folder: Path) -> set[str]:
    """Everything that is no folder."""
    return {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_symlink() or not p.is_dir()
    }
