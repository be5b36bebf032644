"""Snapshots as ranks take them, and commands to fetch them, as the supervisor sends them."""

import json
from typing import Any

from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint.commit import commit_manifest
from opt_train.checkpoint.manifest import Manifest
from opt_train.protocol.commands import Begin, Fetch
from opt_train.protocol.facts import (
    MemoryFile,
    SnapshotTaken,
)
from tests.agent.harness import begin
from tests.agent.snapshots.stores import (
    MEMORY,
    content,
    entry,
)

STATE = json.dumps({"step": 5, "healthy": True, "counters": {"tokens": 1 << 40}}).encode()
FILES = {"shard-00001.safetensors": content(1, 5_000_000), "state.json": STATE}
SHARD = "shard-00001.safetensors"


def commit(run: RunDirectory, path: str, files: dict[str, bytes] = FILES) -> str:
    """Write the manifest of a held checkpoint, as the supervisor does; returns its sha256."""
    folder = run.path / path
    folder.mkdir(parents=True, exist_ok=True)
    return commit_manifest(
        folder, Manifest("1.00", 5, {name: entry(data) for name, data in files.items()}, {})
    )


def to_fetch(
    run: RunDirectory, path: str = MEMORY, source: str = "", origin: str = "", **more: Any
) -> Fetch:
    wanted = more.pop("names", tuple(FILES))
    sources = dict.fromkeys(wanted, source) if source else {}
    return Fetch(path, commit(run, path, **more), wanted, sources, origin)


def snapshot_of(
    run: RunDirectory, node: str = "node-1", files: dict[str, bytes] = FILES, generation: int = 1
) -> Begin:
    made = begin(run, generation, files={name: data.hex() for name, data in files.items()}, step=5)
    values = {field: getattr(made, field) for field in made.__dataclass_fields__}
    return Begin(**{**values, "node": node, "attempt": "1.00"})


def of_rank(run: RunDirectory, rank: int) -> Begin:
    made = begin(run, rank=rank)
    return Begin(
        **{
            **{field: getattr(made, field) for field in made.__dataclass_fields__},
            "attempt": "1.00",
        }
    )


def taken(rank: Any, data: bytes, name: str = SHARD) -> SnapshotTaken:
    return SnapshotTaken(5, (MemoryFile(name, len(data), entry(data).sha256, rank.fd),), 0.1)
