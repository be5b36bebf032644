"""A cluster of one machine: each node is an agent process in a session of its own, that outlives
the supervisor."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import NodeState, NodeStatus
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.registration import read_registration
from opt_train.clusters.topology import Topology
from opt_train.config.run_config import RunConfig
from opt_train.host import signals
from opt_train.host.children import ProgramEnd, run_within
from opt_train.host.gpu_files import count_gpu_files
from opt_train.host.processes import (
    NODE_MARK,
    bears_mark,
    kill_marked,
    mark_of,
    send_signal,
)
from opt_train.link.endpoint import UnixEndpoint, make_socket_path
from opt_train.protocol.exits import BadInput
from opt_train.run.code.frozen_code import code_environment

RANKS_PER_CORE_MAX = 8
"""More on a machine without GPUs are a mistake: tests and trials have two or four."""

log = logging.getLogger(__name__)


class LocalCluster:
    """Nodes ``node-1`` to ``node-N``. A new supervisor finds the agents of the one before by their
    registration."""

    def __init__(self, run: RunDirectory, config: ClusterConfig, code: Path | None = None) -> None:
        self._run, self._code = run, code
        self._slots = config.slots_per_node
        nodes = config.nodes + config.buffer_nodes
        self._names = tuple(f"node-{number}" for number in range(1, nodes + 1))
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def node_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def topology(self) -> Topology:
        return Topology()

    def check_before_start(self, config: RunConfig) -> None:
        """Refuse to start a cluster's recipe on one machine by mistake, with a process for every
        rank of it.

        Raises:
            BadInput: the ranks are more than this machine can be meant to hold.
        """
        gpus = 0 if config.train.device == "cpu" else count_gpu_files()
        cores = len(os.sched_getaffinity(0))
        if gpus:
            ranks_max, has = gpus, f"{gpus} GPUs"
        else:
            ranks_max, has = RANKS_PER_CORE_MAX * cores, f"{cores} cores"
        if config.world_size > ranks_max:
            raise BadInput(
                f"cluster=local would start {config.world_size} ranks on this machine of {has}; "
                "set cluster.nodes=1 cluster.buffer_nodes=0 and cluster.slots_per_node to what it "
                "holds"
            )

    def acquire(
        self,
        failed: Collection[str],
        announce: Callable[[str], None],
        stopped: Callable[[], bool],
        avoided: Sequence[str] = (),
    ) -> bool:
        """This machine is here."""
        return True

    @property
    def outlives_supervisor(self) -> bool:
        return False

    @property
    def ends_soon(self) -> bool:
        return False

    def request(self, count: int, failed: Collection[str]) -> None:
        """Do nothing: this machine has no nodes but its own."""

    def make_endpoint(self) -> UnixEndpoint:
        return UnixEndpoint(make_socket_path())

    def start_agent(self, node: str) -> None:
        """Start the agent, unless one lives. Should two be started at once, the node's lock lets
        one live."""
        child = self._children.get(node)
        registered = read_registration(self._run, node)
        if (registered is not None and registered.alive) or (
            child is not None and child.poll() is None
        ):
            return
        folder = self._run.nodes / node
        self._run.make_folder(folder)
        # -P: no module of the working directory stands in for one of ours.
        command = [sys.executable, "-P", "-m", "opt_train.agent"]
        command += ["--run", str(self._run.path), "--node", node, "--slots", str(self._slots)]
        # Signals stay blocked over the fork: one that came before the agent is deaf would end it.
        # Its own session keeps a terminal's Ctrl-C away.
        with open(folder / "agent.log", "ab") as output, signals.blocked():
            self._children[node] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment(node),
            )
        log.info("%s: agent process %d started", node, self._children[node].pid)

    def _environment(self, node: str) -> dict[str, str]:
        mark = {NODE_MARK: mark_of(self._run.path, node)}
        return {**os.environ, **code_environment(self._code), **mark}

    def fence(self, node: str) -> bool:
        """SIGKILL every process of the node: each inherited the node's mark, whoever its parent is
        by now."""
        gone = kill_marked(mark_of(self._run.path, node))
        child = self._children.get(node)
        if child is not None and gone:
            # Reaped, or it would stay a zombie for as long as this supervisor lives.
            child.wait()
        return gone

    def observe(self) -> dict[str, NodeStatus]:
        return {node: self._observe(node) for node in self._names}

    def living_agents(self) -> tuple[str, ...]:
        # By folder, not by name: a run that was started with more nodes before may have left some.
        folders = sorted(self._run.nodes.glob("*"))
        return tuple(folder.name for folder in folders if self.agent_pid(folder.name))

    def release(self) -> None:
        for node in self._names:
            if not self.fence(node):
                log.error("%s: processes survive SIGKILL; they hang in the kernel", node)

    def run_on(self, node: str, command: Sequence[str], seconds: float) -> ProgramEnd:
        """Run the program as a process of the node."""
        return run_within(seconds, command, self._environment(node))

    def agent_pid(self, node: str) -> int | None:
        """The living agent's pid."""
        registered = read_registration(self._run, node)
        return registered.pid if registered is not None and registered.alive else None

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        """Send a signal to a process of the node; False if `pid` is none of its processes (any
        more)."""
        mark = mark_of(self._run.path, node)
        return send_signal(pid, number, lambda p: bears_mark(p, mark))

    def _observe(self, node: str) -> NodeStatus:
        child = self._children.get(node)
        registered = read_registration(self._run, node)
        if registered is not None and registered.alive:
            return NodeStatus(NodeState.UP)
        if child is not None:
            code = child.poll()
            if code is None:
                return NodeStatus(NodeState.UP)  # it has not registered yet
            return NodeStatus(NodeState.DOWN, f"agent process {child.pid} {_ended(code)}")
        if registered is None:
            # Nothing was ever seen here: no sign of death (invariant 11).
            return NodeStatus(NodeState.UNKNOWN, "no agent has been started")
        return NodeStatus(NodeState.DOWN, f"agent process {registered.pid} is gone")


def _ended(code: int) -> str:
    return f"was killed by {signals.signal_name(-code)}" if code < 0 else f"exited with code {code}"
