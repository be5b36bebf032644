"""How training that goes wrong is answered."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import OPERATIONAL, POSITIVE, Choices


@dataclass(frozen=True, kw_only=True, slots=True)
class StabilityConfig:
    """Steps are those of training; what is watched for, and what is done, stands in
    docs/stability.md."""

    key_kind: ClassVar = OPERATIONAL

    mode: Annotated[str, Choices("observe", "advise", "act")] = "act"
    """How far the supervisor may go by itself when training is unstable. In ``observe`` and
    ``advise`` the journal says what it would have done; `supervisor.mode` holds it back further."""
    modes: str = ""
    """Others than `mode` for single alarms or rungs of theirs, comma-separated:
    ``rise=observe,update_jump/lower_lr=advise``."""
    margin_steps: Annotated[int, POSITIVE] = 12
    """What is gone back to lies at least so many steps before the alarm: the cause may be older
    than its sign."""
    horizon_steps: Annotated[int, POSITIVE] = 80
    """An alarm within so many steps of the last one's place is the same instability again; without
    one what was done has helped."""
    acts_max: Annotated[int, POSITIVE] = 4
    """After so many tries the run is stopped for a person."""
