"""The cluster, the supervisor's patience, and the faults a demonstration plants."""

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
    """Neighbours in the list of nodes that may fail together (a rack, a switch); a node's snapshots have their copy in
    another domain."""
    interface: str = ""
    """Network interface of the collectives; empty: the library's choice (`lo` on a local cluster)."""
    rank_module: str = "opt_train.train.warm"
    """The Python module that an agent starts as a warm rank; one of your own may wrap this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """Patience, in seconds, and budgets. Learned timeouts are never below 3 times the largest value seen."""

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
    """Between the first sign of a failure and the diagnosis: time for the other ranks' last words."""
    orphan_seconds: float = 60.0
    """Agents that nobody leads kill their ranks and leave after this."""
    join_seconds: float = 120.0
    """Longest wait for the nodes of an attempt to dial in."""
    restarts_without_progress: int = 3
    """Restarts for one cause without a new checkpoint, after which a person must decide."""
    status_seconds: float = 2.0
    """Between status lines where the terminal cannot redraw one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """A seeded fault plan, for demonstrations and tests."""

    plan: str = ""
    """Comma-separated ``<kind>@<step>``: ``kill-node@60, kill-rank@120, stop-rank@90, kill-supervisor@150``; the seed
    chooses the victim. Empty: none."""
    seed: int = 0
