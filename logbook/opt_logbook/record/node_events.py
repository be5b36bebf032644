"""What can happen to a node beyond one failure: kinds of journal lines like those of events.py."""

from dataclasses import dataclass

from opt_logbook.record.events import Event
from opt_logbook.record.hardware import Offence


@dataclass(frozen=True, slots=True)
class LemonNoted(Event, kind="lemon_noted"):
    """A node of the run is a repeat offender, a lemon: it is passed over where there is a
    choice."""

    node: str
    score: float
    """Its offences, each halved with every half-life of its age."""
    why: str
    """What it has done, in which time and which runs, for a person."""
    offences: tuple[Offence, ...]


@dataclass(frozen=True, slots=True)
class LemonCleared(Event, kind="lemon_cleared"):
    """A node that was noted as a repeat offender is none any more: its offences are long ago, or of
    a GPU that was exchanged."""

    node: str
    score: float


@dataclass(frozen=True, slots=True)
class LemonPassedOver(Event, kind="lemon_passed_over"):
    """A repeat offender that would train stands by, and `by`, a buffer node, has its place."""

    node: str
    by: str


@dataclass(frozen=True, slots=True)
class NodeReturned(Event, kind="node_returned"):
    """A node that was out has passed its preflight and stands by again."""

    node: str
    tests: int
    seconds: float
    """That the tests took."""


@dataclass(frozen=True, slots=True)
class ActionWithheld(Event, kind="action_withheld"):
    """The supervisor may not do by itself what it would do to `nodes`: this line is all. (Of a
    finding or an incident its own line says so.)"""

    action: str
    """``take_out``, ``grow``, ``request_nodes``, ``pass_over`` or ``return``."""
    nodes: tuple[str, ...]
    mode: str
    """``observe`` or ``advise``."""
    response: str
    """What it would have done, one sentence."""


@dataclass(frozen=True, slots=True)
class ReplacementBegan(Event, kind="replacement_began"):
    """The ranks are ended, a checkpoint having been committed, so that a buffer node takes the
    place of one that was found unfit. Nothing has failed."""

    generation: int
    node: str
    cause: str
    detail: str


@dataclass(frozen=True, slots=True)
class GrowthBegan(Event, kind="growth_began"):
    """The ranks are ended, a checkpoint having been committed, so that nodes that have come since
    fill vacated places. Nothing has failed."""

    generation: int
    nodes: tuple[str, ...]
    """Those that stand ready."""
