"""A hold: a person's word that a run is to train no more until somebody resumes it.

It is on record (`hold_began`, `hold_ended`), so it outlives every process: whoever starts the run
again, be it a person, a script or the scheduler, finds it in force. A supervisor that leads saves,
gives the nodes back and ends, as for a stop; nodes that nobody uses are too expensive to keep.

How it is asked for is in hold_requests.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_logbook.record.events import Event, HoldBegan, HoldEnded
from opt_logbook.story.format import moment

HOLD, RESUME = "hold", "resume"
"""Kinds of messages."""
HOLD_OF = "the hold of "
"""Who stopped a run that is held, and then the name of whoever holds it."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Who holds the run, why (perhaps without a word), and since when, Unix seconds."""

    by: str
    reason: str
    since: float

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"by {self.by} since {moment(self.since)}{why}"


def hold_event(message: Mapping[str, Any], hold: Hold | None) -> HoldBegan | HoldEnded | None:
    """What a message changes about the hold that is in force; None: nothing."""
    by = str(message.get("by", ""))
    match message.get("kind"):
        case "hold" if hold is None:
            asked = message.get("asked", 0.0)
            is_time = isinstance(asked, int | float) and math.isfinite(asked) and asked > 0
            since = float(asked) if is_time else 0.0
            return HoldBegan(by, str(message.get("reason", "")), since)
        case "resume" if hold is not None:
            return HoldEnded(by)
    return None


def hold_after(event: Event, time: float) -> Hold | None:
    """The hold in force behind a line of the journal that changes it; `time` is the line's."""
    return (
        Hold(event.by, event.reason, event.asked or time) if isinstance(event, HoldBegan) else None
    )


def refusal(hold: Hold, run: str | Path) -> str:
    """Why nothing trains, and what to do about it: one sentence, without its point."""
    return f"the run is held {hold}; nothing trains until `opt-train resume {run}`"
