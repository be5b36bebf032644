"""The restart budget of a cause: how often the run may be restarted for it before a person must
decide (invariant 9, no restart loops).

Restarts are budgeted by progress, not by the clock. Each diagnosed incident is a strike of its
cause (`RunState.restarts`, counted by `run.fold`), and a checkpoint beyond the furthest one sets
all strikes back to none. So a fleet that loses three nodes a day goes on for months, and a run that
fails at the same step whoever trains it stops after a few attempts.
"""

from opt_train.supervisor.config import SupervisorConfig

CAUSES_PER_BUDGET = 3
"""Restarts without progress for whatever causes, as a multiple of the budget for one: a fault that
shows another face each time is no reason to go on for ever."""


def restart_budget(restarts: int | None, config: SupervisorConfig) -> int:
    """Restarts for one cause without a new checkpoint.

    Args:
        restarts: the cause's own limit (`Response.restarts`); None: it has none.
    """
    configured = config.restarts_without_progress
    if restarts is None:
        return configured
    # A person who configures less patience has it for every cause.
    return min(restarts, configured)


def is_used_up(
    strikes: int, strikes_in_all: int, restarts: int | None, config: SupervisorConfig
) -> bool:
    """Whether there is no restart left, neither of the cause's own nor of those for all causes.

    Args:
        strikes: incidents of the cause since the last progress, the one at hand included.
        strikes_in_all: the same over all causes.
    """
    if strikes > restart_budget(restarts, config):
        return True
    return strikes_in_all > CAUSES_PER_BUDGET * config.restarts_without_progress
