"""The supervisor's patience and budgets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, POSITIVE


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """Patience, in seconds, and budgets. Learned timeouts are never below 3 times the largest value
    seen."""

    key_kind: ClassVar = OPERATIONAL

    start_seconds: Annotated[float, POSITIVE] = 300.0
    """Longest wait for a rank to begin its first step, before anything is learned."""
    step_seconds: Annotated[float, POSITIVE] = 120.0
    """Longest silence in a step, before anything is learned; `data` and `waiting` likewise."""
    checkpoint_seconds: Annotated[float, POSITIVE] = 600.0
    """Longest silence in a checkpoint: no bytes written."""
    evaluation_seconds: Annotated[float, POSITIVE] = 600.0
    minimum_seconds: Annotated[float, POSITIVE] = 10.0
    """No learned timeout is shorter."""
    settle_seconds: Annotated[float, NOT_NEGATIVE] = 1.0
    """Between the first sign of a failure and the diagnosis: time for the other ranks' last
    facts."""
    orphan_seconds: Annotated[float, POSITIVE] = 60.0
    """Agents that nobody leads kill their ranks and leave after this."""
    join_seconds: Annotated[float, POSITIVE] = 120.0
    """Longest wait for the nodes of an attempt to dial in."""
    restarts_without_progress: Annotated[int, POSITIVE] = 3
    """Restarts for one cause without a new checkpoint, after which a person must decide."""
    status_seconds: Annotated[float, POSITIVE] = 2.0
    """Between status lines where the terminal cannot redraw one."""
