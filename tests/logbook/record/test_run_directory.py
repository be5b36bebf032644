"""Folders of a run are made when they are needed, but a run that a person removed stays removed."""

from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory


def test_folders_below_a_run_are_made_whole_and_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for _ in range(2):
        run.make_folder(run.logs / "1.00" / "node-1")
    assert (tmp_path / "logs" / "1.00" / "node-1").is_dir()


def test_a_removed_run_is_not_brought_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "removed")
    with pytest.raises(FileNotFoundError):
        run.make_folder(run.logs / "1.00" / "node-1")
    assert not run.path.exists()
