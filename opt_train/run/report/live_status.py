"""What a supervisor last showed of its run, for whoever looks from elsewhere: `status.json`.

The journal has what was decided; who has dialed in and what is waited for it does not say, and a
line of it for each would be a heartbeat. The file is replaced when that changes, is worth nothing
once its supervisor leads no more, and nobody decides by it.
"""

import json
from collections.abc import Mapping
from typing import Any

from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.run_directory import RunDirectory

BYTES_MAX = 1 << 16
"""Anything may lie at that path."""


def publish_status(run: RunDirectory, leader: int, shown: Mapping[str, Any]) -> None:
    """Put what is shown in the place of what was.

    Raises:
        OSError: the file cannot be written.
    """
    # Not durable: the next one comes with the next change.
    replace_file(run.status, json.dumps({"leader": leader, **shown}).encode())


def read_status(run: RunDirectory, leader: int) -> dict[str, Any]:
    """What the supervisor of this number showed last; empty: nothing that can be read."""
    try:
        with run.status.open("rb") as file:
            shown = json.loads(file.read(BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    return shown if isinstance(shown, dict) and shown.get("leader") == leader else {}
