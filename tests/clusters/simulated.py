"""A cluster of simulated nodes: threads of the test, that dial the real supervisor by TCP and can
be made to fail. The example of docs/clusters.md."""

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import NodeState, NodeStatus
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.topology import Topology
from opt_train.config.run_config import RunConfig
from opt_train.host.children import ProgramEnd, run_within
from opt_train.link.address import read_address
from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import TcpEndpoint, dial
from opt_train.link.handshake import prove_agent
from opt_train.link.secret import read_secret
from opt_train.protocol.commands import Leave
from opt_train.protocol.exits import BadInput
from opt_train.protocol.facts import AgentState, Heartbeat, SlotState

SLOT = SlotState(0, "warm", True, 0, 0, "", -1, "", -1, 0.0, "")
RANKS_MAX = 64
FENCE_SECONDS = 10.0


class SimulatedNode:
    """A thread that does what an agent without ranks does, until it leaves or is stopped."""

    def __init__(self, run: RunDirectory, name: str) -> None:
        self._run, self._name = run, name
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self._stopped.set()

    async def _serve(self) -> None:
        while not self._stopped.is_set():
            try:
                if await self._serve_one_link():
                    return
            except (LinkRefused, OSError):
                pass  # no supervisor yet, or none any more
            await asyncio.sleep(0.02)

    async def _serve_one_link(self) -> bool:
        """True when it was ordered to leave."""
        address = read_address(self._run.supervisor_address)
        if address is None:
            return False
        connection = Connection(*await dial(address.endpoint, 5))
        try:
            await prove_agent(connection, read_secret(self._run.secret), self._name, 0)
            connection.send(AgentState(self._name, 0, (SLOT,)))
            while not self._stopped.is_set():
                connection.send(Heartbeat((SLOT,)))
                # The supervisor renews the lease every second, so this does not wait for long.
                if isinstance(await connection.receive(5), Leave):
                    return True
            return False
        finally:
            connection.close()


class SimulatedCluster:
    """Nodes ``node-1`` to ``node-N``; `fail` takes one away as a power cut does."""

    def __init__(self, run: RunDirectory, config: ClusterConfig) -> None:
        self._run = run
        nodes = range(1, config.nodes + config.buffer_nodes + 1)
        self._names = tuple(f"node-{number}" for number in nodes)
        self._nodes: dict[str, SimulatedNode] = {}
        self._failed: set[str] = set()

    @property
    def node_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def ends_soon(self) -> bool:
        return False

    @property
    def outlives_supervisor(self) -> bool:
        return False

    def acquire(
        self,
        failed: Collection[str],
        announce: Callable[[str], None],
        stopped: Callable[[], bool],
        avoided: Sequence[str] = (),
    ) -> bool:
        return True

    @property
    def topology(self) -> Topology:
        return Topology()

    def check_before_start(self, config: RunConfig) -> None:
        if config.world_size > RANKS_MAX:
            raise BadInput(f"no more than {RANKS_MAX} ranks are simulated; set cluster.nodes=1")

    def request(self, count: int, failed: Collection[str]) -> None:
        """Do nothing: there are no more."""

    def make_endpoint(self) -> TcpEndpoint:
        return TcpEndpoint("127.0.0.1")

    def start_agent(self, node: str) -> None:
        if node in self._failed:
            raise OSError(f"{node} has no power")
        if node not in self.living_agents():
            self._nodes[node] = SimulatedNode(self._run, node)

    def fail(self, node: str) -> None:
        self._failed.add(node)
        self._nodes[node].stop()

    def fence(self, node: str) -> bool:
        if node in self._nodes:
            self._nodes[node].stop()
            self._nodes[node].thread.join(FENCE_SECONDS)
        return node not in self.living_agents()

    def observe(self) -> dict[str, NodeStatus]:
        return {node: self._observe(node) for node in self._names}

    def _observe(self, node: str) -> NodeStatus:
        if node in self._failed:
            return NodeStatus(NodeState.DOWN, "no power")
        if node in self.living_agents():
            return NodeStatus(NodeState.UP)
        return NodeStatus(NodeState.UNKNOWN, "no agent lives there")

    def living_agents(self) -> tuple[str, ...]:
        return tuple(sorted(n for n, node in self._nodes.items() if node.thread.is_alive()))

    def release(self) -> None:
        for node in self._names:
            self.fence(node)

    def run_on(self, node: str, command: Sequence[str], seconds: float) -> ProgramEnd:
        return run_within(seconds, command)

    def agent_pid(self, node: str) -> int | None:
        return None

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        return False
