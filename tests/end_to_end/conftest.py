"""Every test of this folder is slow, or a whole form: runs that break and recover."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        in_here = Path(__file__).parent in item.path.parents
        if in_here and item.get_closest_marker("whole") is None:
            item.add_marker(pytest.mark.slow)
