"""What an agent has written of itself in ``nodes/<node>/agent.json``."""

import json
from dataclasses import dataclass

from opt_logbook.record.run_directory import RunDirectory

from opt_train.host.processes import is_alive

_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Registration:
    """The agent's process, in the process table of its node."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """Whether the process lives on this machine."""
        # A pid alone proves nothing: after a reboot, or a day, another process has it.
        return is_alive(self.pid, self.start_ticks)


def read_registration(run: RunDirectory, node: str) -> Registration | None:
    """The node's agent as registered; None: it has none, or it has left in good order."""
    try:
        with open(run.nodes / node / "agent.json", "rb") as file:
            fields = json.loads(file.read(_MAX_FILE_BYTES))
        registered = Registration(fields["pid"], fields["start_ticks"])
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    # Whoever can write to the run directory can write this file; to isinstance true is an int.
    whole = (
        type(registered.pid) is int and type(registered.start_ticks) is int and registered.pid > 0
    )
    return registered if whole else None
