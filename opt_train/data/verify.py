"""Prepared data compared with its manifest, file by file.

Without numpy: a run's start asks here."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from opt_train.data.manifest import TOKENIZER_FILE, DatasetManifest, Shard
from opt_train.protocol.exits import BadInput

# In pieces, so that whoever waits hears of progress: a node hashes about 1.5 GB a second.
_HASH_BYTES = 1 << 22


def verify_dataset(directory: Path) -> None:
    """Read every shard and the tokenizer and compare them with their checksums.

    Raises:
        BadInput: one is missing or another than `prepare` wrote; the message names the file.
    """
    manifest = DatasetManifest.read(directory)
    tokenizer = directory / TOKENIZER_FILE
    try:
        found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    except OSError as error:
        raise _unreadable(tokenizer, directory, error) from None
    if found != manifest.tokenizer_sha256:
        raise _changed(tokenizer, directory)
    for split in manifest.splits:
        check_shards(directory, manifest, split, verify=True)


def check_shards(
    directory: Path,
    manifest: DatasetManifest,
    split: str,
    *,
    verify: bool,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compare the sizes of a split's shards with the manifest and, with `verify`, every byte.

    Args:
        progress: called with the bytes done and in all after each piece.

    Raises:
        BadInput: a shard is missing, of the wrong size, or its checksum is wrong; the message names
            the file.
    """
    shards = manifest.shards_of(split)
    total = sum(shard.bytes for shard in shards)
    done = 0
    for shard in shards:
        _check_size(directory, shard)
        if verify:
            done = _check_sum(directory, shard, done, total, progress)


def _check_size(directory: Path, shard: Shard) -> None:
    path = directory / shard.path
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, directory, error) from None
    if found != shard.bytes:
        raise BadInput(
            f"{path} has {found} bytes instead of {shard.bytes}; delete the folder {directory} "
            "and run `opt-train prepare` again"
        )


def _check_sum(
    directory: Path,
    shard: Shard,
    done: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Compare the shard's bytes with its checksum; returns the bytes done so far, this shard's
    included."""
    path = directory / shard.path
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_HASH_BYTES):
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise _unreadable(path, directory, error) from None
    if digest.hexdigest() != shard.sha256:
        raise _changed(path, directory)
    return done


def _unreadable(path: Path, directory: Path, error: OSError) -> BadInput:
    if isinstance(error, FileNotFoundError):
        return BadInput(
            f"{path} is missing; delete the folder {directory} and run `opt-train prepare` again"
        )
    return BadInput(f"{path} cannot be read ({error.strerror}); mend its permissions or its disk")


def _changed(path: Path, directory: Path) -> BadInput:
    return BadInput(
        f"{path} has a wrong checksum: its bytes changed since it was written; delete the folder "
        f"{directory} and run `opt-train prepare` again"
    )
