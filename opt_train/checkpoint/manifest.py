"""What makes a folder of shards a checkpoint: `manifest.json`, committed by rename when all else is
durable.

Standard library only: the supervisor imports this file and no torch.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from opt_train.protocol.framing import to_payload

MANIFEST = "manifest.json"
STATE = "state.json"
SHARD_SUFFIX = ".safetensors"
VERSION = 1

LATE_SECONDS = 20.0
"""For so long a file may be missing from a folder that is there, or its handle be stale, before
that is believed: what one node has made or renamed, a shared file system may show to another one
only when its cache has run out."""
LOOK_AGAIN_SECONDS = 1.0

_HASH_BYTES = 1 << 22

_Found = TypeVar("_Found")

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) after each piece of long work."""


class CheckpointError(Exception):
    """A checkpoint that cannot be saved, trusted or restored. The message names the file or
    tensor."""


def own_file_name(rank: int) -> str:
    """What the file of a rank is called in a snapshot."""
    return f"shard-{rank:05d}{SHARD_SUFFIX}"


def state_content(state: Mapping[str, Any]) -> bytes:
    """The bytes of `state.json`."""
    return (
        json.dumps(to_payload(state), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    ).encode()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of one file, as its writer had them."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a checkpoint that is not a tensor, and the hashes of what is."""

    attempt: str
    step: int
    files: Mapping[str, FileEntry]
    """By path inside the folder; `state.json` is one of them."""
    state: Mapping[str, Any]
    """Rank 0's `state.json`, embedded so that one small file answers every question: counters,
    cursor, the data's fingerprint, RNG rule, loss scale, guards' history, ledger, health."""
    config_sha256: str = ""
    journal_head: str = ""
    """Hash of the newest journal line when this was committed: a cut tail of the journal shows."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Degrees of parallelism of the ranks that saved: for people; restoring works on any layout."""
    version: int = VERSION

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def healthy(self) -> bool:
        """What rank 0 said of the training's health at this step under `healthy`; well, if it said
        nothing."""
        return bool(self.state.get("healthy", True))


def build(
    folder: Path,
    attempt: str,
    step: int,
    files: Mapping[str, tuple[int, str]],
    *,
    config_sha256: str = "",
    journal_head: str = "",
) -> Manifest:
    """The manifest of what the ranks reported to have saved in `folder`: path to (bytes, sha256).

    Raises:
        CheckpointError: a reported file is not there in its full size, a shard lies there that was
            not reported, no shard or no `state.json` was reported, or the state's bytes are not the
            reported ones.
    """
    entries = {path: FileEntry(*files[path]) for path in sorted(files)}
    _check_names(folder, entries)
    _check_sizes(folder, entries)
    if not any(path.endswith(SHARD_SUFFIX) for path in entries):
        raise CheckpointError(f"no shard of {folder} was reported")
    if STATE not in entries:
        raise CheckpointError(f"{folder / STATE} was not reported")
    _check_no_stray(folder, entries)
    content = _content(folder / STATE)
    if hashlib.sha256(content).hexdigest() != entries[STATE].sha256:
        raise CheckpointError(f"{folder / STATE} has a wrong checksum")
    state = _object(folder / STATE, content)
    return _of(attempt, step, entries, state, config_sha256, journal_head)


def of_reports(
    attempt: str,
    step: int,
    files: Mapping[str, tuple[int, str]],
    state: Mapping[str, Any],
    *,
    config_sha256: str = "",
    journal_head: str = "",
) -> Manifest:
    """The manifest of files that lie elsewhere, as their holders reported them; `state` is
    `state.json`'s content.

    Raises:
        CheckpointError: no shard or no `state.json` was reported.
    """
    entries = {path: FileEntry(*files[path]) for path in sorted(files)}
    where = Path(f"step {step} of attempt {attempt}")
    _check_names(where, entries)
    if STATE not in entries or not any(path.endswith(SHARD_SUFFIX) for path in entries):
        raise CheckpointError(f"no shard, or no {STATE}, of {where} was reported")
    return _of(attempt, step, entries, state, config_sha256, journal_head)


def _of(
    attempt: str,
    step: int,
    entries: Mapping[str, FileEntry],
    state: Mapping[str, Any],
    config: str,
    head: str,
) -> Manifest:
    return Manifest(attempt, step, entries, state, config, head, state.get("layout") or {})


def commit(folder: Path, manifest: Manifest) -> str:
    """Make `folder` a checkpoint. Returns the sha256 of the manifest's bytes, which names the
    checkpoint's content.

    Raises:
        OSError: the file system does not allow it; then there is no checkpoint, as far as it lets
            us say so.
    """
    text = json.dumps(
        to_payload(asdict(manifest)), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False
    )
    content = text.encode() + b"\n"
    # The shards' names must be as durable as their bytes before the manifest vouches for them.
    sync_folder(folder)
    partial = folder / f"{MANIFEST}.partial"
    try:
        write_durably(partial, content)
        partial.replace(folder / MANIFEST)
        sync_folder(folder)
    except OSError:
        # Whoever is told that there is no checkpoint must find none: the rename may have happened.
        for name in (MANIFEST, partial.name):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        raise
    return hashlib.sha256(content).hexdigest()


def read(folder: Path, manifest_sha256: str | None = None) -> Manifest:
    """The manifest of the checkpoint in `folder`; with `manifest_sha256`, exactly that one.

    Raises:
        CheckpointError: there is none, it is damaged, or it is another one.
    """
    path = folder / MANIFEST
    content = _content(path)
    if manifest_sha256 is not None and hashlib.sha256(content).hexdigest() != manifest_sha256:
        raise CheckpointError(
            f"{path} is not the manifest that was committed: its checksum is wrong"
        )
    payload = _object(path, content)
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {payload.get('version')!r}; this program reads {VERSION}"
        )
    try:
        files = {str(name): FileEntry(**entry) for name, entry in payload["files"].items()}
        manifest = Manifest(**{**payload, "files": files})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not _has_types(manifest):
        raise CheckpointError(
            f"{path} is damaged: state or step, or a file's size or sha256, is of a wrong type"
        )
    _check_names(folder, files)
    return manifest


def check(folder: Path, manifest_sha256: str | None = None) -> Manifest:
    """Read the manifest, and compare names and sizes of the files with it: all that can be known of
    a checkpoint without reading it.

    Raises:
        CheckpointError: something is missing, short or long, or a shard lies there that nobody
            vouches for.
    """
    manifest = read(folder, manifest_sha256)
    check_sizes(folder, manifest)
    return manifest


def verify(
    folder: Path, manifest_sha256: str | None = None, progress: Progress | None = None
) -> Manifest:
    """Read the manifest and every byte it vouches for.

    Raises:
        CheckpointError: something is missing, short, long, flipped, or a shard lies there that
            nobody vouches for.
    """
    manifest = check(folder, manifest_sha256)
    done = 0
    for path, entry in manifest.files.items():
        check_file(
            folder / path,
            entry,
            None if progress is None else shifted(progress, done, manifest.bytes),
        )
        done += entry.bytes
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """The quick part of `verify`: every file is there in its size, and no shard is too many.

    Raises:
        CheckpointError: as `verify`.
    """
    _check_sizes(folder, manifest.files)
    _check_no_stray(folder, manifest.files)


def check_file(path: Path, entry: FileEntry, progress: Progress | None = None) -> None:
    """Compare one file's bytes with its entry.

    Raises:
        CheckpointError: it is missing, unreadable, or its checksum is wrong.
    """
    digest = hashlib.sha256()
    done = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_HASH_BYTES):
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, entry.bytes)
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(f"{path} has a wrong checksum")


def patiently(
    folder: Path,
    work: Callable[[], _Found],
    waiting: Callable[[], None] = lambda: None,
    seconds: float = LATE_SECONDS,
) -> _Found:
    """`work`, and again while it may have met an old state of `folder`, for `seconds` at most.

    Args:
        waiting: called before each time but the first.

    Raises:
        CheckpointError: what `work` raised last.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except CheckpointError as error:
            if time.monotonic() >= end or not may_be_late(folder, error):
                raise
        time.sleep(LOOK_AGAIN_SECONDS)
        waiting()


def may_be_late(folder: Path, error: CheckpointError) -> bool:
    """Whether `error` may come of an old state of `folder`, and be over in a moment."""
    cause = error.__cause__
    return (
        isinstance(cause, OSError)
        and cause.errno in (errno.ENOENT, errno.ESTALE)
        and folder.is_dir()
    )


def shifted(progress: Progress, before: int, total: int) -> Progress:
    """`progress` as one of several files sees it: `before` bytes are done, `total` there are in
    all."""
    return lambda done, _: progress(before + done, total)


def retire(folder: Path) -> None:
    """Remove a checkpoint, or what a save that was never committed left. Safe to repeat after a
    crash.

    Raises:
        OSError: the file system does not allow it.
    """
    if not folder.exists():
        return
    # The manifest goes first, durably: without it the rest is rubbish that nobody can mistake for a
    # checkpoint.
    had = _unlinked(folder / MANIFEST)
    try:
        sync_folder(folder)
    except OSError:
        # A full disk may refuse it, and what was never a checkpoint gives its space back all the
        # same.
        if had:
            raise
    shutil.rmtree(folder)


def _unlinked(path: Path) -> bool:
    """Remove a file; whether it was there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Listed:
    """One folder under `checkpoints/`, as a person may want to see it."""

    path: Path
    attempt: str
    step: int
    bytes: int
    """What its manifest vouches for; without a readable one, what lies there."""
    files: int
    why: str
    """Empty: it has a readable manifest and all files in their sizes. Otherwise what is wrong, in
    one sentence."""
    has_manifest: bool = True
    """Readable or not."""
    healthy: bool | None = None
    """`Manifest.healthy`; None: no manifest tells."""


def checkpoints(
    root: Path, committed: Mapping[Path, str] | None = None, *, files_here: bool = True
) -> tuple[Listed, ...]:
    """Every checkpoint folder in `root`, by attempt and step, the good and the rest. For people:
    ranks list nothing.

    Args:
        committed: sha256 of the manifests that were committed, by folder; another one there is not
            trusted.
        files_here: False where only the manifests lie in `root`, and agents hold the files.
    """
    found = []
    for folder in sorted(root.glob("*/step-*")):
        if folder.is_dir() and folder.name.removeprefix("step-").isdecimal():
            found.append(_listed(folder, (committed or {}).get(folder), files_here))
    return tuple(sorted(found, key=lambda item: (_numbers(item.attempt), item.step)))


def _listed(folder: Path, manifest_sha256: str | None, files_here: bool) -> Listed:
    attempt, step = folder.parent.name, int(folder.name.removeprefix("step-"))
    try:
        manifest = read(folder, manifest_sha256)
    except CheckpointError as error:
        there = (folder / MANIFEST).exists()
        why = (
            str(error)
            if there or manifest_sha256 is not None
            else "no manifest: it was never committed"
        )
        sizes = _sizes(folder)
        return Listed(folder, attempt, step, sum(sizes), len(sizes), why, there)
    why = ""
    try:
        if files_here:
            check_sizes(folder, manifest)
        if (manifest.attempt, manifest.step) != (attempt, step):
            why = (
                f"{folder / MANIFEST} is that of step {manifest.step} of attempt {manifest.attempt}"
            )
    except CheckpointError as error:
        why = str(error)
    return Listed(
        folder, attempt, step, manifest.bytes, len(manifest.files), why, healthy=manifest.healthy
    )


def _sizes(folder: Path) -> list[int]:
    """Of the files below `folder`; the run may be removing them meanwhile."""
    sizes = []
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file():
                sizes.append(file.stat().st_size)
    return sizes


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


def _numbers(attempt: str) -> tuple[int, ...]:
    """`12.9` before `12.10`; a name that is no attempt comes first."""
    with contextlib.suppress(ValueError):
        return tuple(int(part) for part in attempt.split("."))
    return ()


def _has_types(manifest: Manifest) -> bool:
    """JSON may hold anything under the right names."""
    numbers = [manifest.step, *(entry.bytes for entry in manifest.files.values())]
    words = [manifest.attempt, *(entry.sha256 for entry in manifest.files.values())]
    return (
        isinstance(manifest.state, dict)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and all(isinstance(word, str) for word in words)
    )


def _check_names(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    for path in entries:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != path or path == MANIFEST:
            raise CheckpointError(
                f"the manifest of {folder} names {path!r}, which is not a file inside it"
            )


def _check_sizes(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    for path, entry in entries.items():
        _check_size(folder / path, entry)


def _check_no_stray(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    # The reader takes every shard it finds: a stray one could replace tensors of a checkpoint that
    # is otherwise good.
    for stray in sorted(folder.rglob(f"*{SHARD_SUFFIX}")):
        if stray.relative_to(folder).as_posix() not in entries:
            raise CheckpointError(f"{stray} is not in the manifest")


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if size != entry.bytes:
        raise CheckpointError(f"{path} has {size} bytes instead of {entry.bytes}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return payload


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing")
    return CheckpointError(f"{path} cannot be read: {error.strerror}")
