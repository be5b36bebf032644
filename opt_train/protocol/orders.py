"""Orders: what the supervisor asks of the training loop. They reach rank 0, and all ranks through
the step's word.

An order's number rides in the word that all ranks reduce once a step, so every rank obeys at the
same boundary; the body is broadcast only when the number moved. Numbers grow by one over the life
of a run.
"""

from dataclasses import dataclass

from opt_train.protocol.framing import Message


@dataclass(frozen=True, slots=True)
class Save(Message, kind="save"):
    """Save a checkpoint at this boundary and go on."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class SaveAndStop(Message, kind="save_and_stop"):
    """Save a checkpoint at this boundary and leave with exit code 75."""

    number: int
    reason: str


Order = Save | SaveAndStop
