"""Runs that the logbook's tests read."""

from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from tests.logbook.demo_run import write_demo


@pytest.fixture
def demo(tmp_path: Path) -> RunDirectory:
    """The demo run, whole and finished."""
    return write_demo(tmp_path / "demo")
