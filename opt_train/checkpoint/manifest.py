"""`manifest.json`: what a checkpoint consists of, read and compared with what lies there.

How one comes to be there, and goes, is `commit.py`. Standard library only: the supervisor imports
this file and no torch.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from opt_train.protocol.framing import to_payload

MANIFEST = "manifest.json"
STATE = "state.json"
SHARD_SUFFIX = ".safetensors"
VERSION = 1

_HASH_BYTES = 1 << 22

ReportProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each piece of long work."""


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
        """The training's health at this step, as rank 0 has it under `healthy`; well, where it has
        nothing."""
        return bool(self.state.get("healthy", True))


def read(folder: Path, manifest_sha256: str | None = None) -> Manifest:
    """The manifest of the checkpoint in `folder`; with `manifest_sha256`, exactly that one.

    Raises:
        CheckpointError: there is none, it is damaged, or it is another one.
    """
    path = folder / MANIFEST
    content = read_file(path)
    if manifest_sha256 is not None and hashlib.sha256(content).hexdigest() != manifest_sha256:
        raise CheckpointError(
            f"{path} is not the manifest that was committed: its checksum is wrong"
        )
    payload = parse_object(path, content)
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
    check_names(folder, files)
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
    folder: Path, manifest_sha256: str | None = None, progress: ReportProgress | None = None
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
    check_no_stray_shard(folder, manifest.files)


def check_file(path: Path, entry: FileEntry, progress: ReportProgress | None = None) -> None:
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


def shifted(progress: ReportProgress, before: int, total: int) -> ReportProgress:
    """`progress` as one of several files sees it: `before` bytes are done, `total` there are in
    all."""
    return lambda done, _: progress(before + done, total)


def _has_types(manifest: Manifest) -> bool:
    """JSON may hold anything under the right names."""
    numbers = [manifest.step, *(entry.bytes for entry in manifest.files.values())]
    texts = [manifest.attempt, *(entry.sha256 for entry in manifest.files.values())]
    return (
        isinstance(manifest.state, dict)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and all(isinstance(text, str) for text in texts)
    )


def check_names(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    for path in entries:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != path or path == MANIFEST:
            raise CheckpointError(
                f"the manifest of {folder} names {path!r}, which is not a file inside it"
            )


def _check_sizes(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    for path, entry in entries.items():
        check_size(folder / path, entry)


def check_no_stray_shard(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    # The reader takes every shard it finds: a stray one could replace tensors of a checkpoint that
    # is otherwise good.
    for stray in sorted(folder.rglob(f"*{SHARD_SUFFIX}")):
        if stray.relative_to(folder).as_posix() not in entries:
            raise CheckpointError(f"{stray} is not in the manifest")


def check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if size != entry.bytes:
        raise CheckpointError(f"{path} has {size} bytes instead of {entry.bytes}")


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
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
