"""Somebody's weights as one of our checkpoints: weights alone, and what is needed to know the
model."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.durable_file import write_durably
from opt_train.checkpoint.manifest import STATE, ReportProgress
from opt_train.exchange import safetensors_file, tokenizer_files
from opt_train.exchange.checkpoint import MODEL
from opt_train.exchange.folder import check_free, filled_beside
from opt_train.exchange.imported import ATTEMPT
from opt_train.exchange.sources import Source
from opt_train.exchange.stored_tensor import TYPE_NAMES, bytes_in, check_complete, shapes_of
from opt_train.model.config import ModelConfig

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@dataclass(frozen=True, slots=True)
class Imported:
    """What was written."""

    model: ModelConfig
    dtype: str
    parameters: int
    bytes: int
    tokenizer: bool
    manifest_sha256: str


def bring_in(source: Source, to: Path, writing: ReportProgress | None = None) -> Imported:
    """Write a committed checkpoint folder; it appears whole or not at all. About one tensor at a
    time is in memory.

    The weights keep their type; where a file mixes types, all become fp32, which holds each of them
    exactly.

    Raises:
        BadInput: a tensor is missing, unexpected, of a wrong shape or not finite; or `to` is not
            free.
        OSError: the file system does not allow it.
    """
    check_free(to)
    # By names, shapes and types alone: a wrong model is refused before gigabytes are written.
    check_complete(source.path, source.tensors, source.model)
    tensors = {name: source.tensors[name] for name, _ in shapes_of(source.model)}
    dtypes = {one.dtype for one in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    total = sum(bytes_in(one.shape, dtype) for one in tensors.values())
    state = {
        "step": 0,
        "healthy": True,
        "model": dataclasses.asdict(source.model),
        "weights": TYPE_NAMES[dtype],
        "imported_from": {"path": str(source.path.absolute()), "kind": source.kind},
    }
    with filled_beside(to) as folder:
        done = 0

        def written(count: int) -> None:
            nonlocal done
            done += count
            if writing is not None:
                writing(done, total)

        files = {
            SHARD: safetensors_file.write(
                folder / SHARD, tensors, dtype, named=lambda name: MODEL + name, progress=written
            )
        }
        beside = source.path if source.path.is_dir() else source.path.parent
        copies = tokenizer_files.copy(
            tokenizer_files.tokenizer_files(beside), folder / tokenizer_files.FOLDER
        )
        write_durably(folder / STATE, (json.dumps(state, indent=1) + "\n").encode())
        for path in (folder / STATE, *copies):
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = (
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
        # Last: without a manifest a folder is no checkpoint, whatever lies in it.
        sha256 = commit_manifest(folder, build_manifest(folder, ATTEMPT, 0, files))
    return Imported(
        source.model, TYPE_NAMES[dtype], total // dtype.itemsize, total, bool(copies), sha256
    )
