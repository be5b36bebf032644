"""The scheduler that owns the nodes: what it says of them, and when, and how it fails.

It may be away, slow, or behind: then an observation is unknown or old, agents start late, and a
fence does not succeed. What it says of a node that is cut off is what Slurm says: down, after a
while, whatever still runs there.
"""

from collections import deque
from dataclasses import dataclass, field

from opt_train.supervisor.inputs import ClusterObserved

PATIENCE_SECONDS = 15.0
"""A node that answers nobody is called down after this."""
CUT_OFF = "Not responding"
SCHEDULER_AWAY = "the controller does not answer"


@dataclass
class Scheduler:
    """All times are virtual seconds."""

    down: dict[str, str] = field(default_factory=dict)
    """Node -> why it is down."""
    draining: dict[str, str] = field(default_factory=dict)
    taken_back: set[str] = field(default_factory=set)
    """Those of `down` that it has taken away from the run."""
    cut_since: dict[str, float] = field(default_factory=dict)
    """Node -> since when nothing reaches it."""
    away_until: float = 0.0
    lag_seconds: int = 0
    """How old an observation is."""
    start_seconds: float = 0.0
    """From the wish for an agent to its process."""
    coming: int = 0
    """Nodes that were asked for and are not there yet."""
    given: int = 0
    """Nodes that were added so far: nobody has nodes without end."""
    _seen: deque[ClusterObserved] = field(default_factory=lambda: deque(maxlen=64))

    def is_away(self, now: float) -> bool:
        return now < self.away_until

    def observe(self, names: tuple[str, ...], now: float) -> ClusterObserved:
        """What a supervisor that asks now is answered."""
        if self.is_away(now):
            return ClusterObserved(
                dict.fromkeys(names, "unknown"), dict.fromkeys(names, SCHEDULER_AWAY)
            )
        # A node that is cut off and one without power look the same from here.
        late = {n for n, since in self.cut_since.items() if now - since > PATIENCE_SECONDS}
        reasons = {**dict.fromkeys(late, CUT_OFF), **self.down}
        states = {node: "down" if node in reasons else "up" for node in names}
        taken_back = frozenset(self.taken_back & reasons.keys())
        self._seen.append(ClusterObserved(states, reasons, dict(self.draining), taken_back))
        return self._seen[max(0, len(self._seen) - 1 - self.lag_seconds)]
