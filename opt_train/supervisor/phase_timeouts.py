"""How long a rank may stay in one phase without moving: configured at first, then learned from the
run itself.

A cache, not state: a new supervisor begins with the configured values and learns again.
"""

from opt_train.supervisor.config import SupervisorConfig

MARGIN = 3.0
"""No timeout is ever shorter than this many times the largest length seen."""

# DLRover times first steps and evaluations as it times all others, and flags them as hangs.
FIRST_STEPS = 2
"""Steps after a start that are learned apart: they allocate, compile, and fill caches."""

ENOUGH = {"start": 3, "checkpoint": 3, "evaluation": 3}
"""Samples before a phase's configured value is given up; `ENOUGH_STEPS` for those of every step."""

ENOUGH_STEPS = 20


class PhaseTimeouts:
    """Largest length seen and number of samples of each phase, apart for first steps and later
    ones."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._minimum = config.minimum_seconds
        self._configured = {
            "start": config.start_seconds,
            "checkpoint": config.checkpoint_seconds,
            "evaluation": config.evaluation_seconds,
        }
        self._step = config.step_seconds
        self._first = max(config.start_seconds, config.step_seconds)
        self._largest: dict[tuple[str, bool], float] = {}
        self._samples: dict[tuple[str, bool], int] = {}

    def learn(self, phase: str, first: bool, seconds: float) -> None:
        """A phase has ended, or has moved, after `seconds`. One that is still going on teaches
        nothing."""
        key = (phase, first)
        self._samples[key] = self._samples.get(key, 0) + 1
        # The largest, no mean or quantile: one kill of ranks that would have gone on costs a
        # restart, a limit that is too long costs the wait alone.
        if seconds > self._largest.get(key, 0.0):
            self._largest[key] = seconds

    def limit(self, phase: str, first: bool) -> float:
        """Seconds without movement in `phase` after which a rank counts as hung."""
        key = (phase, first)
        learned = MARGIN * self._largest.get(key, 0.0)
        if self._samples.get(key, 0) >= ENOUGH.get(phase, ENOUGH_STEPS):
            return max(self._minimum, learned)
        return max(self._configured_for(phase, first), learned)

    def _configured_for(self, phase: str, first: bool) -> float:
        return self._configured.get(phase) or (self._first if first else self._step)
