"""An open incident of a run: from the first sign until training is again where it was."""

from dataclasses import dataclass

from opt_logbook.record.events import FailureSeen, IncidentDiagnosed


@dataclass(frozen=True, slots=True)
class Incident:
    """An incident that has not been closed: its two journal entries, and what has come of it."""

    seen: FailureSeen
    attempt: str
    step: int
    """Last step known to be done when it was seen; training has recovered when it is there
    again."""
    opened: float
    """Unix seconds of `failure_seen`."""
    diagnosis: IncidentDiagnosed | None = None
    """None until it is journalled."""
    strikes: int = 0
    """How often this cause has struck since the last progress, this time included."""
    strikes_in_all: int = 0
    restored_step: int = -1
    """Where the first attempt after it began; -1: none has begun yet."""
    first_step: float = 0.0
    """Unix seconds of the first new step after it; 0: not yet."""

    @property
    def number(self) -> int:
        return self.seen.incident

    @property
    def cause(self) -> str:
        """The diagnosed cause; empty until then."""
        return self.diagnosis.cause if self.diagnosis is not None else ""

    @property
    def detail(self) -> str:
        return self.diagnosis.detail if self.diagnosis is not None else ""

    @property
    def culprit(self) -> str:
        """The node the diagnosis names; empty: none."""
        return self.diagnosis.node if self.diagnosis is not None else ""
