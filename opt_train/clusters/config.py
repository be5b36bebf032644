"""What a run asks of its cluster: nodes, buffer nodes, slots, and how their ranks are reached."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, POSITIVE, Choices, Matches


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterKind:
    """What holds for every cluster of a kind. Ranks, agents and checks ask it here: they have no
    `Cluster` at hand."""

    nodes_share_machine: bool
    """Every node is this machine: the ranks of all nodes divide its cores."""
    has_queue: bool
    """A scheduler takes batch scripts: `opt-train submit`."""
    default_interface: str
    """The collectives' network interface where `cluster.interface` is empty; itself empty: the
    library's choice."""


KINDS = {
    # gloo would else ask for the host's name, which on a laptop may lead nowhere.
    "local": ClusterKind(nodes_share_machine=True, has_queue=False, default_interface="lo"),
    "slurm": ClusterKind(nodes_share_machine=False, has_queue=True, default_interface=""),
}

_ONE_WORD = Matches(
    r"([^\s-]\S*)?", "{key}={value!r} must be one word that does not begin with -, as Slurm's own"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """What is asked of Slurm, for the allocation of the nodes that train and for the supervisor's
    job; used where `cluster.kind` is slurm."""

    key_kind: ClassVar = OPERATIONAL

    account: Annotated[str, _ONE_WORD] = ""
    partition: Annotated[str, _ONE_WORD] = ""
    """Of the nodes that train; empty: the site's default."""
    qos: Annotated[str, _ONE_WORD] = ""
    reservation: Annotated[str, _ONE_WORD] = ""
    constraint: Annotated[str, _ONE_WORD] = ""
    """Features a node must have, such as ``a100&ib``."""
    time_limit: Annotated[str, _ONE_WORD] = ""
    """Of the allocation, as Slurm writes it (``2-00:00:00``); empty: the partition's."""
    stop_before_seconds: Annotated[float, NOT_NEGATIVE] = 600.0
    """How long before the allocation's time limit the run saves and gives the nodes back, to ask
    for others. The limit is read again and again: an admin may shorten it."""
    gpu_option: str = "--gpus-per-node={slots}"
    """How this site asks for GPUs, such as ``--gres=gpu:a100:{slots}``; ``{slots}`` is
    `cluster.slots_per_node`. Empty: none are asked for."""
    options: str = ""
    """Further options of the allocation, separated by blanks as in a shell."""
    supervisor_partition: Annotated[str, _ONE_WORD] = ""
    """Where the supervisor's one-CPU job runs; empty: where the nodes are."""
    supervisor_time_limit: Annotated[str, _ONE_WORD] = ""
    """Of the supervisor's job; empty: the partition's."""
    supervisor_options: str = ""
    """Further options of the supervisor's job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where ranks run."""

    key_kind: ClassVar = OPERATIONAL

    kind: Annotated[str, Choices(*KINDS)] = "local"
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
    slurm: SlurmConfig = SlurmConfig()
    rank_module: str = "opt_train.train.warm"
    """The Python module that an agent starts as a warm rank; one of your own may wrap this one."""

    def ranks_per_machine(self, world_size: int) -> int:
        """Ranks, of `world_size` in all, that divide the cores of one machine."""
        if KINDS[self.kind].nodes_share_machine:
            return world_size
        return self.slots_per_node

    @property
    def collectives_interface(self) -> str:
        """The network interface of the collectives; empty: the library's choice."""
        return self.interface or KINDS[self.kind].default_interface
