"""What a site grants an ordinary user, one power at a time; unknown is unknown."""

from dataclasses import dataclass
from enum import StrEnum


class Granted(StrEnum):
    """Whether a power is there."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"
    """Nobody could say: no reason to rely on it, and none to give it up."""


@dataclass(frozen=True, slots=True)
class SitePower:
    """One thing that a site may grant."""

    power: str
    granted: Granted
    found: str
    """How this is known, with the words or the number that were found."""
    then: str
    """What opt_train does accordingly."""
