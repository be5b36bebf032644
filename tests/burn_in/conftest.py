"""Fixtures of this room's tests: `opt-train` in this process, and no process left behind."""

from tests.command import say
from tests.processes import nothing_is_left

__all__ = ["nothing_is_left", "say"]
