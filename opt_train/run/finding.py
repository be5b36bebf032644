"""What probes found of a run's nodes, as its journal has it."""

from dataclasses import dataclass

from opt_logbook.record.events import FindingNoted


@dataclass(frozen=True, slots=True)
class NotedFinding:
    """A finding that still counts: of the current attempt, or permanent."""

    event: FindingNoted
    attempt: str
    """The current attempt when it was noted; empty: none had begun."""
    saved_since: bool = False
    """A checkpoint of the run directory was committed after it."""
