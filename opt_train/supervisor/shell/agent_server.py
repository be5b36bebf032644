"""The supervisor's end of all links: agents dial in, prove themselves and report their state; from
then on what they send becomes input of the core.

A node has one link. A newer one takes the place of the older: an agent that dials again knows that
its old connection is dead, and the supervisor may not have noticed yet.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import Endpoint
from opt_train.link.handshake import HANDSHAKE_SECONDS, prove_supervisor
from opt_train.link.listener import AuthenticatedListener
from opt_train.protocol.commands import LeaderLease
from opt_train.protocol.facts import (
    AgentState,
    Heartbeat,
    Metrics,
    NumberedFact,
    RankFact,
    is_metrics_line,
)
from opt_train.protocol.framing import Message
from opt_train.supervisor.inputs import (
    AgentConnected,
    AgentDisconnected,
    FactReceived,
    HeartbeatReceived,
    Input,
    MetricsReceived,
)

SILENCE_SECONDS = 30.0
"""An agent's heart beats every few seconds; a link that was silent this long is dropped, and the
agent dials again."""
ADMISSION_SECONDS = 3 * HANDSHAKE_SECONDS
"""For the handshake and the agent's state, which may be long."""
STRANGERS_MAX = 1024
"""Connections that have not proved themselves yet; for more, the oldest of them are closed. All
agents of a large run may dial at once when a supervisor comes back."""

log = logging.getLogger(__name__)


class AgentServer:
    """Turns what agents send into inputs of the core, in the order each one sends it."""

    def __init__(
        self,
        endpoint: Endpoint,
        secret: bytes,
        leader: int,
        nodes: Collection[str],
        handle_input: Callable[[Input], None],
        lease_seconds: float = 1.0,
    ) -> None:
        """`lease_seconds`: between two renewals of the agents' lease."""
        self._endpoint = endpoint
        self._secret = secret
        self._leader = leader
        self._nodes = set(nodes)
        self._handle_input = handle_input
        self._lease_seconds = lease_seconds
        self._current: dict[str, Connection] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._listener = AuthenticatedListener(
            self._admit,
            self._serve,
            admission_seconds=ADMISSION_SECONDS,
            strangers_max=STRANGERS_MAX,
        )

    def allow(self, nodes: Iterable[str]) -> None:
        """Let the agents of `nodes` in, too: the cluster has handed them out."""
        self._nodes.update(nodes)

    async def start(self) -> Endpoint:
        """Listen, and renew every agent's lease from now on. Returns the endpoint to publish."""
        bound = await self._listener.start(self._endpoint, backlog=STRANGERS_MAX)
        self._renewing = asyncio.create_task(self._renew_leases())
        return bound

    @property
    def connected(self) -> frozenset[str]:
        """Nodes whose agents are connected now."""
        return frozenset(self._current)

    def send(self, node: str, command: Message) -> bool:
        """Send to the node's agent; False if it is not connected."""
        connection = self._current.get(node)
        if connection is None:
            return False
        try:
            connection.send(command)
        except LinkRefused as refused:
            # A peer that does not read is cut off, not waited for: it dials again, and the core
            # sends what still matters.
            log.warning("%s: %s", node, refused)
            connection.close()
            return False
        return True

    async def stop(self) -> None:
        """Close every link and stop listening."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._listener.stop()

    async def _admit(self, connection: Connection) -> AgentState:
        await prove_supervisor(connection, self._secret, self._leader)
        state = await connection.receive(HANDSHAKE_SECONDS)
        if (
            not isinstance(state, AgentState)
            or state.node != connection.node
            or state.node not in self._nodes
        ):
            raise LinkRefused(
                f"{connection.node} is no node of this run, or did not begin with its state"
            )
        return state

    async def _serve(self, connection: Connection, state: AgentState) -> None:
        node = connection.node
        older = self._current.get(node)
        self._current[node] = connection
        if older is not None:
            older.close()
        try:
            connection.send(LeaderLease(self._leader))
            self._handle_input(AgentConnected(node, state))
            while self._current.get(node) is connection:
                message = await connection.receive(SILENCE_SECONDS)
                # While we waited a newer connection of the node may have taken over; from the older
                # one nothing is taken any more.
                if self._current.get(node) is connection:
                    self._handle_input(_input(node, message))
        except LinkRefused as refused:
            log.info("link to %s ended: %s", node, refused)
        finally:
            connection.close()
            if self._current.get(node) is connection:
                del self._current[node]
                self._handle_input(AgentDisconnected(node))

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds)
            for node in tuple(self._current):
                self.send(node, LeaderLease(self._leader))


def _input(node: str, message: Message) -> Input:
    match message:
        case NumberedFact(number=number, fact=fact):
            return FactReceived(node, number, fact)
        case Heartbeat():
            return HeartbeatReceived(node, message)
        case RankFact(generation=generation, fact=Metrics(line=line)) if is_metrics_line(line):
            return MetricsReceived(node, generation, line)
    raise LinkRefused(f"{node} sent {message.kind!r}, which an agent does not send")
