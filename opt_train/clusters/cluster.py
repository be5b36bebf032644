"""What the supervisor asks of whatever hands out nodes; each kind of cluster is one file beside
this one."""

from dataclasses import dataclass
from typing import Protocol

UP, DOWN, UNKNOWN = "up", "down", "unknown"


@dataclass(frozen=True, slots=True)
class NodeView:
    """What the cluster says of a node: `state` is ``up``, ``down`` or ``unknown``; `reason` says
    why it is down."""

    state: str
    reason: str = ""


class Cluster(Protocol):
    """Nodes to run agents on. Every method may block for a moment; the shell calls them off its
    event loop."""

    @property
    def node_names(self) -> tuple[str, ...]:
        """Every node of the allocation, those meant to train first."""

    def start_agent(self, node: str) -> None:
        """Start the node's agent, unless it runs (whoever started it). Raises OSError if it cannot
        be started."""

    def fence(self, node: str) -> bool:
        """Make sure nothing of the run lives on the node; False if something survives."""

    def observe(self) -> dict[str, NodeView]:
        """Every node as it is now. What cannot be told is ``unknown``."""

    def release(self) -> None:
        """Give the nodes back: fence what still lives."""
