"""What a run asks of its cluster: nodes, buffer nodes, slots, and how their ranks are reached."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, POSITIVE, Choices


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where ranks run."""

    key_kind: ClassVar = OPERATIONAL

    kind: Annotated[str, Choices("local")] = "local"
    """``local``: agents are processes of this machine, one a node."""
    nodes: Annotated[int, POSITIVE] = 1
    """Nodes that train."""
    buffer_nodes: Annotated[int, NOT_NEGATIVE] = 0
    """Nodes that stand by."""
    slots_per_node: Annotated[int, POSITIVE] = 1
    """Ranks a node."""
    nodes_per_domain: Annotated[int, POSITIVE] = 1
    """Neighbours in the list of nodes that may fail together (a rack, a switch); a node's snapshots
    have their copy in another domain."""
    interface: str = ""
    """Network interface of the collectives; empty: the library's choice (`lo` on a local
    cluster)."""
    rank_module: str = "opt_train.train.warm"
    """The Python module that an agent starts as a warm rank; one of your own may wrap this one."""
