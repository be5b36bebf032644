"""Processes whose file system fails as a test says: `shim`; skipped, visibly, where there is no C
compiler."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.shim import Shim, build, compiler
from tests.processes import nothing_is_left, run

__all__ = ["nothing_is_left", "run"]
"""For the tests that hit real processes of a run's nodes."""


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled `fault_shim.c`."""
    if compiler() is None:
        pytest.skip("no C compiler (gcc or cc): file system faults are not tested here")
    return build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def quick_folder() -> Iterator[Path]:
    """In memory where there is such a file system: hundreds of saves need not wait for a real
    disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def shim(fault_library: Path, tmp_path: Path) -> Shim:
    """A shim without rules; give its `environment` to the processes that it should reach."""
    return Shim(fault_library, tmp_path / "shim")
