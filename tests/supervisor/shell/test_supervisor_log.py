"""The supervisor's own log."""

import logging
from pathlib import Path

import pytest

from opt_train.supervisor.shell.supervisor_log import SupervisorLog


def test_a_full_disk_costs_lines_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with SupervisorLog(Path("/dev/full")):
        logging.getLogger("opt_train.supervisor").info("a line")
    assert capfd.readouterr() == ("", "")
