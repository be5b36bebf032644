"""A run whose ranks take snapshots, and the disk of its nodes."""

import json
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from tests.agent.harness import make_run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The disk of all nodes of the test: each has its own folder there."""
    return tmp_path / "disk"


@pytest.fixture
def run(tmp_path: Path, disk: Path) -> RunDirectory:
    """A run whose ranks take snapshots."""
    made = make_run(tmp_path, orphan_seconds=30.0)
    config = json.loads(made.config_json.read_text())
    config["cluster"]["rank_module"] = "snapshots.snapshot_rank"
    config["checkpoint"] = {"memory_every_steps": 5, "node_directory": str(disk)}
    made.config_json.write_text(json.dumps(config))
    return made
