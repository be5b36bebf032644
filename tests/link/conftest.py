"""No test of this room leaves a process or a socket folder behind."""

from tests.processes import nothing_is_left, run

__all__ = ["nothing_is_left", "run"]
