"""What an agent does with snapshots: it keeps those of its ranks, fetches files from other agents,
gives to others.

A rank has a copy of its part in memory of its own, and names it; the agent opens the same memory,
so that it outlives the rank without a byte copied. Copies for a partner node, and files for a
restart, are fetched; each is read and hashed before it counts.

Nothing here decides what is kept or where: commands do. Nothing here waits for a disk or a peer in
the event loop.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.snapshots import transfer
from opt_train.agent.snapshots.placement import (
    SnapshotMissing,
    check_names,
    directory_of,
    place_of,
)
from opt_train.agent.snapshots.store import SnapshotStore
from opt_train.agent.snapshots.transfer import TransferServer, Unreachable
from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.late_files import (
    LATE_SECONDS,
    LOOK_AGAIN_SECONDS,
    may_be_late,
)
from opt_train.checkpoint.manifest import MANIFEST, STATE, CheckpointError, FileEntry, Manifest
from opt_train.host.interface import address_of_interface
from opt_train.host.worker_thread import WorkerThread
from opt_train.link.secret import SecretUnusable, read_secret
from opt_train.protocol.commands import Begin, Drop, Fetch
from opt_train.protocol.facts import (
    Fetched,
    NumberedFact,
    SavedFile,
    SnapshotFiles,
    SnapshotStored,
    SnapshotTaken,
)
from opt_train.protocol.framing import Message, ProtocolError, parse, to_line
from opt_train.run.checkpoint import MEMORY, path_of_save

STATE_BYTES_MAX = 256 << 10
"""A rank's `state.json` is a few KB; a larger one is none."""
FETCHES = 2
"""Worked on at a time; each goes through its files one by one."""
OPEN_SECONDS = 30.0
"""Longest wait for the node's disk and the host's name before the agent goes on without what it
cannot have."""

log = logging.getLogger(__name__)


class SnapshotService:
    """The snapshots of one agent."""

    def __init__(
        self,
        run: RunDirectory,
        node: str,
        node_directory: str,
        add_fact: Callable[[Message], None],
        start: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
    ) -> None:
        """`add_fact` takes facts that must arrive; `start` runs a task, and sees to it that its
        failure is noticed."""
        self._run, self._add_fact, self._start = run, add_fact, start
        self._worker = WorkerThread()
        self.store = SnapshotStore(
            directory_of(node_directory), place_of(run.path, node), self._worker
        )
        self._server = TransferServer(self.store, self._secret)
        self._known_secret = b""
        self._slots = asyncio.Semaphore(FETCHES)
        self._under_way: dict[str, list[tuple[Fetch, asyncio.Task[None]]]] = {}
        self.address = ""
        """``host:port`` at which others get what is here; empty: nothing can be had."""

    async def open(self, serve: bool, interface: str) -> None:
        """Find what an earlier agent left on the node's disk; with `serve`, listen for other agents
        at `interface`.

        What fails is logged, and the agent goes on without.
        """
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await self.store.open()
        except (OSError, TimeoutError) as trouble:
            log.error(
                "what lies in %s is not held: %s",
                self.store.folder,
                str(trouble) or "its disk does not answer",
            )
        if not serve:
            return
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                self.address = await self._server.start(
                    await self._worker.do(address_of_interface, interface)
                )
        except (OSError, TimeoutError) as trouble:
            log.error(
                "other nodes can get nothing from this one: %s",
                str(trouble) or "the host's name is not found",
            )
            return
        if self.address.startswith("127.") and interface != "lo":
            log.warning("only this host reaches %s: set cluster.interface", self.address)

    async def close(self) -> None:
        """Let everything go, but what is on the node's disk."""
        await self._server.stop()
        tasks = [task for waiting in self._under_way.values() for _, task in waiting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.close()
        self._worker.close()

    def files(self) -> tuple[SnapshotFiles, ...]:
        """All files by checkpoint."""
        return self.store.files()

    # A rank's snapshot ----------------------------------------------------------------------------

    def keep(self, pid: int, begin: Begin, taken: SnapshotTaken) -> None:
        """Keep what the rank of `begin`, process `pid`, has taken, and report it; a log line if
        that fails."""
        path = path_of_save(begin.attempt, taken.step, MEMORY)
        try:
            for file in taken.files:
                self.store.adopt(path, file.path, pid, file.fd, file.bytes, file.sha256)
            fact = SnapshotStored(
                generation=begin.generation,
                attempt=begin.attempt,
                rank=begin.rank,
                step=taken.step,
                files=tuple(SavedFile(file.path, file.bytes, file.sha256) for file in taken.files),
                seconds=taken.seconds,
                state=self._state(path, taken) if begin.rank == 0 else None,
                is_last=taken.is_last,
            )
            # A state that the supervisor could not read would cost the link: read it here first.
            parse(to_line(NumberedFact(0, fact)))
        except (SnapshotMissing, OSError, ProtocolError, ValueError, RecursionError) as trouble:
            log.warning(
                "the snapshot of rank %d at step %d is not held: %s",
                begin.rank,
                taken.step,
                trouble,
            )
            self.store.forget(path, [file.path for file in taken.files])
            return
        self._add_fact(fact)

    def _state(self, path: str, taken: SnapshotTaken) -> dict[str, Any]:
        content = self.store.small_file(path, STATE, STATE_BYTES_MAX)
        claimed = next((file.sha256 for file in taken.files if file.path == STATE), "")
        if hashlib.sha256(content).hexdigest() != claimed:
            raise SnapshotMissing(f"{STATE} of {path} has another hash than the rank said")
        state = json.loads(content)
        if not isinstance(state, dict):
            raise SnapshotMissing(f"{STATE} of {path} is not a JSON object")
        return state

    # Commands -------------------------------------------------------------------------------------

    def fetch(self, command: Fetch) -> None:
        """Begin to carry `command` out, after others of the same checkpoint; it is not begun
        twice."""
        waiting = self._under_way.setdefault(command.path, [])
        if any(other == command for other, _ in waiting):
            return
        task = self._start(self._fetch(command, waiting[-1][1] if waiting else None))
        waiting.append((command, task))

    def drop(self, command: Drop) -> None:
        """Keep nothing of the checkpoint any more, and fetch nothing of it."""
        for _, task in self._under_way.pop(command.path, []):
            task.cancel()
        try:
            self.store.drop(command.path)
        except SnapshotMissing as trouble:
            log.error("nothing is dropped: %s", trouble)

    async def _fetch(self, command: Fetch, before: "asyncio.Task[None] | None") -> None:
        if before is not None:
            await asyncio.wait([before])
        async with self._slots:
            folder, why = "", ""
            try:
                manifest, content = await self._manifest(command)
                await self._get_all(command, manifest)
                folder = await self.store.link(command.path, command.names, content)
            except (CheckpointError, SnapshotMissing) as trouble:
                why = str(trouble)
            except OSError as trouble:
                why = f"{self.store.folder} cannot be used: {trouble.strerror or trouble}"
        if why:
            log.warning("%s could not be fetched: %s", command.path, why)
        # Done before it is reported: the same command is a new one from now on.
        waiting = [item for item in self._under_way.pop(command.path, []) if item[0] != command]
        if waiting:
            self._under_way[command.path] = waiting
        self._add_fact(Fetched(command.path, command.names, why, folder))

    async def _manifest(self, command: Fetch) -> tuple[Manifest, bytes]:
        """As `retry_while_late`, with the worker free meanwhile. Raises `CheckpointError` or
        `SnapshotMissing`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LATE_SECONDS
        while True:
            try:
                return await self._worker.do(_read_manifest, self._run.path, command)
            except CheckpointError as error:
                folder = self._run.path / command.path
                if loop.time() >= end or not await self._worker.do(may_be_late, folder, error):
                    raise
            await asyncio.sleep(LOOK_AGAIN_SECONDS)

    async def _get_all(self, command: Fetch, manifest: Manifest) -> None:
        """Get every file that can be had. Raises `SnapshotMissing` if that is not all of them."""
        failed = []
        unreachable: dict[str, Unreachable] = {}
        # Each node begins at its own part, so that not all of them ask the first one at once.
        own = next(
            (k for k, name in enumerate(command.names) if self.store.has(command.path, name)), 0
        )
        for name in (*command.names[own:], *command.names[:own]):
            source = command.sources.get(name, "")
            try:
                if name not in manifest.files:
                    raise SnapshotMissing(f"the manifest of {command.path} names no file {name!r}")
                if not await self._is_here(command, name, manifest.files[name]):
                    if source in unreachable:
                        raise unreachable[source]
                    await self._get(command, name, manifest.files[name], source)
            except SnapshotMissing as trouble:
                failed.append(str(trouble))
                if isinstance(trouble, Unreachable):
                    unreachable[source] = trouble
            except OSError as trouble:
                failed.append(
                    f"{name} of {command.path} cannot be written: {trouble.strerror or trouble}"
                )
        if failed:
            more = f" ({len(failed) - 1} more files are missing)" if len(failed) > 1 else ""
            raise SnapshotMissing(failed[0] + more)

    async def _is_here(self, command: Fetch, name: str, entry: FileEntry) -> bool:
        """Whether the file is here and good, after copying what is here under the origin's path."""
        if await self.store.is_good(command.path, name, entry):
            return True
        if command.origin in ("", command.path):
            return False
        try:
            async with self.store.reading(command.origin, name) as file:
                if not file.may_be(entry):
                    return False
                async with self.store.partial_file(command.path, name, entry) as partial:
                    await partial.copy(file)
                    await partial.commit()
        except SnapshotMissing:
            # A rank has written over it. Whether it did is found out by reading it once more, and
            # then it goes.
            await self.store.is_good(command.origin, name, entry)
            return False
        return True

    async def _get(self, command: Fetch, name: str, entry: FileEntry, source: str) -> None:
        if not source:
            raise SnapshotMissing(
                f"{name} of {command.path} is not held here, and nobody was named who holds it"
            )
        try:
            secret = await self._secret()
        except SecretUnusable as trouble:
            raise SnapshotMissing(str(trouble)) from None
        async with self.store.partial_file(command.path, name, entry) as partial:
            await transfer.get(source, secret, command.origin or command.path, name, entry, partial)
            await partial.commit()

    async def _secret(self) -> bytes:
        # Read once: it lies on the shared file system.
        self._known_secret = self._known_secret or await self._worker.do(
            read_secret, self._run.secret
        )
        return self._known_secret


def _read_manifest(run_directory: Path, command: Fetch) -> tuple[Manifest, bytes]:
    """The checkpoint's manifest, and its bytes. Raises `CheckpointError` or `SnapshotMissing`."""
    for name in command.names or (STATE,):
        check_names(command.path, name)
    folder = run_directory / command.path
    manifest = manifests.read(folder, command.manifest_sha256)
    content = (folder / MANIFEST).read_bytes()
    if hashlib.sha256(content).hexdigest() != command.manifest_sha256:
        raise SnapshotMissing(f"{folder / MANIFEST} has changed while it was read")
    return manifest, content
