"""What the supervisor asks of whatever hands out nodes; each kind of cluster is one file beside
this one."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from opt_train.clusters.topology import Topology
from opt_train.config.run_config import RunConfig
from opt_train.host.children import ProgramEnd
from opt_train.link.endpoint import Endpoint


class NodeState(StrEnum):
    """What a cluster can say of a node."""

    UP = "up"
    DOWN = "down"
    UNKNOWN = "unknown"
    """The cluster cannot tell: neither dead nor fine (invariant 11)."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as its cluster sees it; `reason` is why it is down or unknown."""

    state: NodeState
    reason: str = ""
    draining: str = ""
    """An admin wants the node back, and waits for its work to end: why."""
    taken_back: bool = False
    """It is down since the scheduler has taken it away from the run, whatever its health."""


class Submission(Protocol):
    """The supervisor of a run as a batch job, for clusters with a queue."""

    def script(self, program: str, arguments: Sequence[str]) -> str:
        """The batch script, for a person to read.

        Args:
            program: path of `opt-train`.
            arguments: of `opt-train run`, beside the cluster's own.
        """

    def submit(self, script: str) -> tuple[str, Path]:
        """Keep the script in the run directory and queue it; returns the job and its log.

        Raises:
            BadInput: the scheduler refuses it.
        """


class JobTask(StrEnum):
    """What a job of a run is for."""

    SUPERVISOR = "supervisor"
    """Where the supervisor runs on the nodes themselves, it holds them too."""
    NODES = "nodes"
    MORE_NODES = "more nodes"


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job of a run that its scheduler has, waiting or running."""

    job: str
    task: JobTask
    state: str
    """As the scheduler names it: ``PENDING``, ``RUNNING``."""
    reason: str
    seconds_left: float | None
    """Until its time limit; None: it has none."""

    @property
    def waits(self) -> bool:
        return self.state == "PENDING"


class RunQueue(Protocol):
    """What a scheduler has of a run, whoever leads it or nobody."""

    def jobs(self) -> tuple[QueuedJob, ...]:
        """The run's living jobs, oldest first.

        Raises:
            OSError: the scheduler does not answer.
        """

    def cancel(self, job: str) -> None:
        """Raises OSError if the scheduler refuses or does not answer."""

    @property
    def has_script(self) -> bool:
        """Whether the run was submitted, so that it can be submitted again."""

    def submit_again(self) -> str:
        """Queue the script by which the run was last submitted; returns the job.

        Raises:
            BadInput: the scheduler refuses it.
        """


class Cluster(Protocol):
    """Nodes to run agents on, and every difference between the kinds of clusters.

    A back end owes its caller these duties (docs/clusters.md says how to write one):

    1. `acquire` has the nodes, once; from then on `node_names` do not change, and the first
       `cluster.nodes` of them train, ranks in this order: neighbours in the list are neighbours in
       the network, where `topology` knows it. What `request` adds later is in `observe` from then
       on.
    2. `make_endpoint` picks the transport: TCP is bound to one address, never to all interfaces
       (invariant 13).
    3. `start_agent` starts ``python -m opt_train.agent`` on a node, in an environment that bears
       `NODE_MARK`, deaf to the death of the supervisor: a supervisor that comes back adopts what
       its predecessor started. An agent that lives is left alone, whoever started it.
    4. `fence` is certain or says no: after True no process of the run lives on the node. It asks
       neither the agent nor its good will.
    5. `observe` reports what the cluster knows, not what it guesses: a node that does not answer
       is unknown until something else speaks against it.
    6. `release` gives the nodes back; no allocation outlives its run (invariant 9).
    7. `run_on` runs a small program on a node and comes back within its deadline, whatever the
       program and the node do.
    8. `check_before_start` refuses, in a sentence with its fix, what could never work here, before
       anything has been started or changed.

    What ranks and agents must know of a kind without a cluster at hand (which ranks share a
    machine's cores, the default interface of the collectives) stands beside the kind itself, in
    `clusters/config.py`.

    Every method may block for a moment; the supervisor's shell calls them off its event loop.
    """

    @property
    def node_names(self) -> tuple[str, ...]:
        """Every node of the allocation, those meant to train first."""

    @property
    def topology(self) -> Topology:
        """The network between the nodes; an empty one where nobody knows it."""

    def check_before_start(self, config: RunConfig) -> None:
        """Refuse a run that these nodes cannot be meant to hold.

        Raises:
            BadInput: one sentence that names the keys to change.
        """

    def acquire(
        self,
        failed: Collection[str],
        announce: Callable[[str], None],
        stopped: Callable[[], bool],
        avoided: Sequence[str] = (),
    ) -> bool:
        """Have the nodes: those of an earlier supervisor of the run where they still are, else new
        ones, without those in `failed`. May wait for days.

        Args:
            failed: nodes that this run has given up.
            announce: takes a sentence for a person, such as what is waited for.
            stopped: asked again and again; once it is true the wait ends and what was asked for is
                taken back.
            avoided: nodes that were bad in other runs, the worst first: to be left out as far as
                enough others work.

        Returns:
            False: it was stopped. Before True `node_names` is empty where names are not known.

        Raises:
            BadInput: there will never be such nodes.
        """

    def request(self, count: int, failed: Collection[str]) -> None:
        """Ask for `count` nodes more, in the place of what was asked for before; `observe` shows
        them once they are had. Waits for nothing.

        Args:
            failed: nodes that this run has given up.

        Raises:
            OSError: nobody could be asked now.
        """

    @property
    def outlives_supervisor(self) -> bool:
        """A SIGTERM means that the scheduler ends the supervisor's job alone, perhaps to begin it
        again elsewhere; the nodes stay. Asked once they are had."""

    @property
    def ends_soon(self) -> bool:
        """The scheduler takes the nodes back so soon that a save must begin now; by the newest
        observation."""

    def make_endpoint(self) -> Endpoint:
        """Where this run's supervisor shall listen, such that the agents of all nodes reach it and
        as few others as can be: a new Unix socket, or one TCP address and port 0.

        Raises:
            OSError: this host has no such place.
        """

    def start_agent(self, node: str) -> None:
        """Start the node's agent, unless it runs (whoever started it). Raises OSError if it cannot
        be started."""

    def fence(self, node: str) -> bool:
        """Make sure nothing of the run lives on the node; False if something survives."""

    def observe(self) -> dict[str, NodeStatus]:
        """Every node as it is now."""

    def living_agents(self) -> tuple[str, ...]:
        """Nodes where an agent of this run lives, of an earlier allocation too; sorted."""

    def release(self) -> None:
        """Give the nodes back: fence what still lives."""

    def run_on(self, node: str, command: Sequence[str], seconds: float) -> ProgramEnd:
        """Run a program on the node and return what came of it; after `seconds` it is killed. The
        node need not have an agent, and one that it has is not disturbed.

        It runs as an agent would, in the same container if there is one; `sys.executable` in
        `command` stands for the Python there.

        The program's output is to be small: it is a result, not a log."""

    def agent_pid(self, node: str) -> int | None:
        """The living agent's pid on its node. Fault plans ask, to write down what they kill."""

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        """Send a signal to a process of the node; False if `pid` is none of its processes (any
        more). Fault plans ask."""
