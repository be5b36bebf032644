"""What a run asks of its cluster: nodes, buffer nodes, slots, and how their ranks are reached."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where ranks run."""

    kind: str = "local"
    """``local``: agents are processes of this machine, one a node."""
    nodes: int = 1
    """Nodes that train."""
    buffer_nodes: int = 0
    """Nodes that stand by."""
    slots_per_node: int = 1
    """Ranks a node."""
    nodes_per_domain: int = 1
    """Neighbours in the list of nodes that may fail together (a rack, a switch); a node's snapshots
    have their copy in another domain."""
    interface: str = ""
    """Network interface of the collectives; empty: the library's choice (`lo` on a local
    cluster)."""
    rank_module: str = "opt_train.train.warm"
    """The Python module that an agent starts as a warm rank; one of your own may wrap this one."""
