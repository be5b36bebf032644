"""What a run asks of its cluster: nodes, buffer nodes, slots, and how their ranks are reached."""

import math
import shlex
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, POSITIVE, Choices, Law, Matches


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

HEARTBEATS_A_SECOND = 400
"""Of all agents together."""

_ONE_WORD = Matches(
    r"([^\s-]\S*)?", "{key}={value!r} must be one word that does not begin with -, as Slurm's own"
)
_MOUNT = r"/[^:,\s]*:/[^:,\s]*(:[A-Za-z+=-]+)?"
_MOUNTS = Matches(
    rf"({_MOUNT}(,{_MOUNT})*)?",
    "{key}={value!r} is no list of mounts; give full paths, as /data:/data,/scratch:/scratch:ro",
)


def _are_words(value: str) -> bool:
    if "\n" in value:  # it would end a line of a batch script
        return False
    try:
        shlex.split(value)
    except ValueError:
        return False
    return True


SHELL_WORDS = Law(
    _are_words, "{key}={value!r} must be one line whose quotes end, as in a shell", ""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """What is asked of Slurm, for the allocation of the nodes that train and for the supervisor's
    job; used where `cluster.kind` is slurm."""

    key_kind: ClassVar = OPERATIONAL

    holder: Annotated[str, Choices("outside", "job", "inside")] = "outside"
    """What holds the nodes: ``outside``, an allocation that belongs to no process (salloc);
    ``job``, a batch job that sleeps, where salloc is forbidden; ``inside``, the supervisor's own
    job, whose first node it runs on."""
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
    ask_for_others: bool = True
    """While nodes are missing to train or to stand by, ask for others by a further allocation."""
    gpu_option: str = "--gpus-per-node={slots}"
    """How this site asks for GPUs, such as ``--gres=gpu:a100:{slots}``; ``{slots}`` is
    `cluster.slots_per_node`. Empty: none are asked for."""
    options: Annotated[str, SHELL_WORDS] = ""
    """Further options of the allocation, separated by blanks as in a shell."""
    container: Annotated[str, Choices("", "pyxis", "apptainer")] = ""
    """What runs agents and ranks in a container: ``pyxis`` (options of srun, over enroot) or
    ``apptainer`` (a command in front). Empty: they run on the node itself."""
    container_image: Annotated[str, _ONE_WORD] = ""
    """The image: what `container` takes for one. It must have Python 3.11 or newer and the packages
    that opt_train needs; opt_train itself comes from the run directory."""
    container_mounts: Annotated[str, _MOUNTS] = ""
    """Further mounts, as ``/data:/data,/scratch:/scratch:ro``. The run directory, the data and the
    initial weights are always mounted."""
    container_python: Annotated[str, _ONE_WORD] = "python3"
    """Python inside the image."""
    container_options: Annotated[str, SHELL_WORDS] = ""
    """Further options of the container, separated by blanks as in a shell, such as ``--nv``."""
    supervisor_partition: Annotated[str, _ONE_WORD] = ""
    """Where the supervisor's one-CPU job runs; empty: where the nodes are."""
    supervisor_time_limit: Annotated[str, _ONE_WORD] = ""
    """Of the supervisor's job; empty: the partition's."""
    supervisor_options: Annotated[str, SHELL_WORDS] = ""
    """Further options of the supervisor's job."""

    @property
    def container_option_words(self) -> list[str]:
        return shlex.split(self.container_options)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where ranks run."""

    key_kind: ClassVar = OPERATIONAL

    kind: Annotated[str, Choices(*KINDS)] = "local"
    """``local``: agents are processes of this machine, one a node."""
    nodes: Annotated[int, POSITIVE] = 1
    """Nodes that train."""
    min_nodes: Annotated[int, NOT_NEGATIVE] = 0
    """The fewest to go on with when a node fails and no buffer node is left: at the same global
    batch, until other nodes come. 0: nine in ten of `cluster.nodes`."""
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
    bind_ranks: bool = True
    """Each rank runs on the cores of its GPU's NUMA node, or on its share of the node's cores where
    there are no GPUs; not on a local cluster, whose nodes share one machine."""
    slurm: SlurmConfig = SlurmConfig()
    code: Annotated[str, Choices("lineage", "node", "installed")] = "lineage"
    """Which code agents and ranks run. ``lineage``: the copy in the run directory, made when the
    lineage opens, whatever becomes of the installation; ``node``: ranks run from a copy of that one
    on their node's own disk (`checkpoint.node_directory`), for many nodes; ``installed``: the
    installation, which must not change then while the run lives."""
    rank_module: str = "opt_train.train.warm"
    """The Python module whose `main()` is a warm rank; one of your own may wrap this one. Its
    `import_everything()`, if it has one, is called once a node, before ranks are forked."""

    @property
    def nodes_at_least(self) -> int:
        """`min_nodes`, or what its 0 means."""
        return self.min_nodes or -(-self.nodes * 9 // 10)

    @property
    def hides_installation(self) -> bool:
        """Agents run in a container, where this installation is not."""
        return self.has_queue and bool(self.slurm.container)

    @property
    def has_queue(self) -> bool:
        """Whether a scheduler hands out nodes: others can be asked for while the run goes on."""
        return KINDS[self.kind].has_queue

    @property
    def names_machines(self) -> bool:
        """Whether a node's name is one machine's, in every run."""
        return not KINDS[self.kind].nodes_share_machine

    @property
    def runs_copy(self) -> bool:
        """Whether agents and ranks run a lineage's copy of the code."""
        return self.code != "installed"

    @property
    def binds_ranks(self) -> bool:
        """Whether agents bind their ranks to cores."""
        return self.bind_ranks and not KINDS[self.kind].nodes_share_machine

    def ranks_per_machine(self, world_size: int) -> int:
        """Ranks, of `world_size` in all, that divide the cores of one machine."""
        if KINDS[self.kind].nodes_share_machine:
            return world_size
        return self.slots_per_node

    def for_seconds(self, seconds: float) -> "ClusterConfig":
        """The same nodes, asked for no longer than work of `seconds` takes."""
        minutes = str(math.ceil(seconds / 60))
        return replace(self, slurm=replace(self.slurm, time_limit=minutes, stop_before_seconds=0.0))

    @property
    def heartbeat_seconds(self) -> float:
        """Between two heartbeats of an agent, and two renewals of its lease: the supervisor of a
        large run has no time to read more."""
        return max(1.0, (self.nodes + self.buffer_nodes) / HEARTBEATS_A_SECOND)

    @property
    def collectives_interface(self) -> str:
        """The network interface of the collectives; empty: the library's choice."""
        return self.interface or KINDS[self.kind].default_interface
