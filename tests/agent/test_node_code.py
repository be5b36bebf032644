"""Ranks that run from their node's disk run the lineage's code, whatever lies there."""

import os
import stat
from pathlib import Path

import pytest

from opt_train.agent.node_code import copy_to_node
from opt_train.config.compose import compose
from opt_train.run.code.frozen_code import RECORD, freeze, sha256_of_sources

STEP = "opt_train/train/step.py"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A lineage's copy."""
    freeze(tmp_path / "code" / "1", compose(["model=tiny"]))
    return tmp_path / "code" / "1"


def test_the_code_is_copied_once_and_for_this_user_alone(kept: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    copy = copy_to_node(kept, str(disk))
    assert copy.is_relative_to(disk / f"opt_train-{os.getuid()}" / "code")
    assert sha256_of_sources(copy) == sha256_of_sources(kept)
    assert stat.S_IMODE(copy.parent.stat().st_mode) == 0o700
    before = (copy / STEP).stat().st_ino
    assert copy_to_node(kept, str(disk)) == copy
    assert (copy / STEP).stat().st_ino == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_what_is_not_the_code_is_made_anew(kept: Path, tmp_path: Path) -> None:
    copy = copy_to_node(kept, str(tmp_path / "disk"))
    (copy / STEP).write_text("raise SystemExit('half of a file')")
    assert copy_to_node(kept, str(tmp_path / "disk")) == copy
    assert (copy / STEP).read_bytes() == (kept / STEP).read_bytes()


def test_a_disk_that_takes_nothing_is_done_without(kept: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text("a file")
    assert copy_to_node(kept, str(disk)) == kept


def test_a_folder_of_somebody_else_is_not_trusted(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / f"opt_train-{os.getuid()}").mkdir(parents=True, mode=0o777)
    (tmp_path / "disk" / f"opt_train-{os.getuid()}").chmod(0o777)
    assert copy_to_node(kept, str(tmp_path / "disk")) == kept


def test_an_installation_is_no_lineages_copy(kept: Path, tmp_path: Path) -> None:
    (kept / RECORD).unlink()
    assert copy_to_node(kept, str(tmp_path / "disk")) == kept
    assert not (tmp_path / "disk").exists()
