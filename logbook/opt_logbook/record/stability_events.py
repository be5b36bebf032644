"""The kinds of lines about training that goes wrong, what was done about it, and going back."""

from dataclasses import dataclass

from opt_logbook.record.event import Event


@dataclass(frozen=True, slots=True)
class InstabilitySeen(Event, kind="instability_seen"):
    """A sign in the metrics says that training goes wrong, at the line's step; what is done about
    it follows as an order."""

    number: int
    """Of the instability; the same when it comes again."""
    alarm: str
    what: str
    rung: str
    """What is done: a rung of the ladder."""
    response: str
    """The same in words."""
    expectation: str
    """What should be the case, and by when, if it helps."""
    loss: float
    samples: int = 0
    """Of the order of the data consumed at the alarm."""
    order: int = 0
    """The order that answers it in place; 0: what is done begins with going back."""
    lr_factor: float = 1.0
    """What the learning rate is multiplied by."""
    ratio: float = 1.0
    """How many times its usual size the measured value is, where it is measured so."""
    scale: float = 0.0
    """The loss scale that steps were taken with before, where it is one of those; 0: none is
    known."""


@dataclass(frozen=True, slots=True)
class InstabilityClosed(Event, kind="instability_closed"):
    """What became of it: ``helped``, or ``handed over`` to a person; ``kept``: a learning rate that
    was lowered stays so."""

    number: int
    outcome: str
    what: str


@dataclass(frozen=True, slots=True)
class DataProbed(Event, kind="data_probed"):
    """What the data around an alarm looks like to the state that was gone back to, at the line's
    step: whether it is the data that is bad."""

    order: int
    """The rollback."""
    verdict: str
    """``normal``, ``bad data``, ``bad state`` or ``unknown``."""
    what: str
    """The same in words."""
    bad_from: int
    """Where the data was usual last, in samples of its order; 0 where `bad_to` is."""
    bad_to: int
    """Where it is usual again; what lies between is left out if the supervisor may act. 0: none is
    bad."""
    places: tuple[int, ...]
    """Where it was looked, in samples of the order of the data."""
    losses: tuple[float, ...]
    """What was found there, in nats per token."""
    usual: float
    """The loss that training had come to with the state; NaN: it is not known."""
    tolerance: float
    """How far from that a loss is still usual."""


@dataclass(frozen=True, slots=True)
class ReplayCompared(Event, kind="replay_compared"):
    """Whether steps that ranks went back for in place gave the same numbers when they were trained
    again: what happened once lies in a device, what comes again in the state or the data."""

    order: int
    """The rollback."""
    verdict: str
    """``reproduced``, ``one-time`` or ``not deterministic``."""
    what: str
    """The same in words."""
    same: int
    """Steps that were the same to the bit."""
    differs: int
    """The first step that was not; 0: none."""
    ranks: int
    """Whose own numbers were not, at that step."""
    rank: int
    """The one, where it is one; else -1."""
    node: str
    """Of that rank; empty: it is not known."""


@dataclass(frozen=True, slots=True)
class BatchSource:
    """A document that a batch has a part of."""

    source: str
    """File, and line of it where it has one a document; empty: it is not on record."""
    document: int
    """Its number in the training data, from 0."""
    share: float
    """Of the batch's tokens, 0 to 1."""


@dataclass(frozen=True, slots=True)
class BatchSources(Event, kind="batch_sources"):
    """What the batch consisted of that took the line's attempt to its step, where there was an
    alarm. Written when it has been read, behind what was done about the alarm."""

    alarm: str
    documents: int
    sources: tuple[BatchSource, ...] = ()
    """The largest shares first; the others are counted alone."""


@dataclass(frozen=True, slots=True)
class RollbackBegan(Event, kind="rollback_began"):
    """The ranks are ended to begin again from an earlier checkpoint, as an order wants it that they
    cannot obey in place. Nothing has failed."""

    generation: int
    order: int
