"""An open incident of a run: from the first sign until training is again where it was."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Incident:
    """An incident that has not been closed. `cause` is empty until it is diagnosed."""

    number: int
    generation: int
    attempt: str
    step: int
    """Last step known to be done when it was seen; training has recovered when it is there
    again."""
    opened: float
    """Unix seconds of `failure_seen`."""
    node: str
    rank: int
    what: str
    sign: str
    cause: str = ""
    detail: str = ""
    culprit: str = ""
    """The node the diagnosis names."""
    strikes: int = 0
    """How often this cause has struck since the last progress, this time included."""
    strikes_in_all: int = 0
    restored_step: int = -1
    """Where the first attempt after it began; -1: none has begun yet."""
    first_step: float = 0.0
    """Unix seconds of the first new step after it; 0: not yet."""
