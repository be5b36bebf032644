"""The supervisor's patience and budgets."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """Patience, in seconds, and budgets. Learned timeouts are never below 3 times the largest value
    seen."""

    start_seconds: float = 300.0
    """Longest wait for a rank to begin its first step, before anything is learned."""
    step_seconds: float = 120.0
    """Longest silence in a step, before anything is learned; `data` and `waiting` likewise."""
    checkpoint_seconds: float = 600.0
    """Longest silence in a checkpoint: no bytes written."""
    evaluation_seconds: float = 600.0
    minimum_seconds: float = 10.0
    """No learned timeout is shorter."""
    settle_seconds: float = 1.0
    """Between the first sign of a failure and the diagnosis: time for the other ranks' last
    words."""
    orphan_seconds: float = 60.0
    """Agents that nobody leads kill their ranks and leave after this."""
    join_seconds: float = 120.0
    """Longest wait for the nodes of an attempt to dial in."""
    restarts_without_progress: int = 3
    """Restarts for one cause without a new checkpoint, after which a person must decide."""
    status_seconds: float = 2.0
    """Between status lines where the terminal cannot redraw one."""
