"""One of our checkpoints as a Hugging Face folder, written tensor by tensor."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from opt_train.checkpoint.durable_file import write_durably
from opt_train.checkpoint.manifest import ReportProgress
from opt_train.exchange import safetensors_file, tokenizer_files
from opt_train.exchange.checkpoint import weights_in
from opt_train.exchange.configuration import generation, to_hugging_face
from opt_train.exchange.folder import check_free, filled_beside
from opt_train.exchange.sources import CONFIG, INDEX, SAFETENSORS
from opt_train.exchange.stored_tensor import (
    TYPE_NAMES,
    TYPES,
    StoredTensor,
    bytes_in,
    check_complete,
    shapes_of,
)
from opt_train.model.config import ModelConfig

SHARD_BYTES = 5_000_000_000
"""Of a file, unless told otherwise; as Hugging Face counts, in powers of ten."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    dtype: str
    parameters: int
    bytes: int
    files: tuple[str, ...]
    tokenizer: bool


def export(
    model: ModelConfig,
    checkpoint: Path,
    manifest_sha256: str | None,
    to: Path,
    *,
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Iterable[Path] = (),
    verifying: ReportProgress | None = None,
    writing: ReportProgress | None = None,
) -> Exported:
    """Write the folder; it appears whole or not at all. About one tensor at a time is in memory.

    Args:
        manifest_sha256: the checkpoint's, as the journal has it; None: whichever is there.
        dtype: fp32, bf16 or fp16; empty: as the checkpoint has them.
        shard_bytes: a file is no larger, unless one tensor is.
        tokenizer: files that travel along.

    Raises:
        BadInput: the checkpoint is damaged or of another model, a number is not finite, or `to` is
            not free.
        OSError: the file system does not allow it.
    """
    # Before every byte of the checkpoint is verified: a mistake in the place shows at once.
    check_free(to)
    stored = weights_in(checkpoint, manifest_sha256, verifying)
    check_complete(checkpoint, stored, model)
    tensors = {name: stored[name] for name, _ in shapes_of(model)}
    dtype = dtype or TYPE_NAMES[next(iter(tensors.values())).dtype]
    shards = _shards(tensors, dtype, shard_bytes)
    total = sum(bytes_in(one.shape, TYPES[dtype]) for one in tensors.values())
    with filled_beside(to) as folder:
        done = 0

        def written(count: int) -> None:
            nonlocal done
            done += count
            if writing is not None:
                writing(done, total)

        for name, share in shards.items():
            safetensors_file.write(folder / name, share, TYPES[dtype], progress=written)
        if len(shards) > 1:
            placed = {tensor: name for name, share in shards.items() for tensor in share}
            _write_json(
                folder / (SAFETENSORS + INDEX),
                {"metadata": {"total_size": total}, "weight_map": placed},
            )
        _write_json(folder / CONFIG, to_hugging_face(model, dtype))
        _write_json(folder / "generation_config.json", generation())
        copied = tokenizer_files.copy(tokenizer, folder)
        tokenizer_files.add_settings(folder, model.positions)
    return Exported(dtype, total // TYPES[dtype].itemsize, total, tuple(shards), bool(copied))


def _shards(
    tensors: Mapping[str, StoredTensor], dtype: str, shard_bytes: int
) -> dict[str, dict[str, StoredTensor]]:
    """Which tensors go into which file, in the model's order."""
    shares: list[dict[str, StoredTensor]] = [{}]
    room = shard_bytes
    for name, one in tensors.items():
        size = bytes_in(one.shape, TYPES[dtype])
        # A tensor beyond the limit has a file to itself, and no file is empty.
        if size > room and shares[-1]:
            shares.append({})
            room = shard_bytes
        shares[-1][name] = one
        room -= size
    if len(shares) == 1:
        return {SAFETENSORS: shares[0]}
    stem, suffix = SAFETENSORS.split(".")
    return {
        f"{stem}-{n:05}-of-{len(shares):05}.{suffix}": share
        for n, share in enumerate(shares, start=1)
    }


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    write_durably(path, (json.dumps(values, indent=2) + "\n").encode())
