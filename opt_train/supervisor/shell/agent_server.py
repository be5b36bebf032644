"""The supervisor's end of all links: agents dial in, prove themselves, tell their state, and are
heard."""

import asyncio
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from opt_train.link.connection import HANDSHAKE_SECONDS, Connection, LinkRefused, prove_supervisor
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

LEAD_SECONDS = 1.0
SILENCE_SECONDS = 30.0
"""An agent pulses every second; a link that was silent this long is dropped, and the agent dials
again."""
MAX_STRANGERS = 1024
"""Connections that have not proved themselves yet; more are closed at the door."""

log = logging.getLogger(__name__)


class AgentServer:
    """Listens on a Unix socket and turns what agents tell into inputs of the core, in the order
    each one tells it."""

    def __init__(
        self,
        socket: Path,
        secret: bytes,
        leader: int,
        nodes: Collection[str],
        tell: Callable[[Input], None],
    ) -> None:
        self._socket = socket
        self._secret = secret
        self._leader = leader
        self._nodes = frozenset(nodes)
        self._tell = tell
        self._current: dict[str, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, and pulse to every agent from now on."""
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._accept, self._socket, backlog=1024)
        finally:
            os.umask(mask)
        self._keep(asyncio.create_task(self._lead()))

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
            log.warning("%s: %s", node, refused)
            connection.close()
            return False
        return True

    async def stop(self) -> None:
        """Close every link and stop listening."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= MAX_STRANGERS:
            writer.transport.abort()
            return
        self._strangers += 1
        self._keep(asyncio.create_task(self._serve(Connection(reader, writer))))

    async def _serve(self, connection: Connection) -> None:
        stranger = True
        try:
            async with asyncio.timeout(
                3 * HANDSHAKE_SECONDS
            ):  # a byte now and then does not hold the door open
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
            self._strangers -= 1
            stranger = False
            await self._hear(connection, state)
        except (LinkRefused, TimeoutError) as refused:
            log.info(
                "link to %s ended: %s",
                connection.node or "a stranger",
                str(refused) or "handshake took too long",
            )
        finally:
            self._strangers -= stranger
            connection.close()
            if self._current.get(connection.node) is connection:
                del self._current[connection.node]
                self._tell(AgentDisconnected(connection.node))

    async def _hear(self, connection: Connection, state: AgentState) -> None:
        node = connection.node
        older = self._current.get(node)
        self._current[node] = connection
        if older is not None:
            older.close()
        connection.send(LeaderLease(self._leader))
        self._tell(AgentConnected(node, state))
        while self._current.get(node) is connection:
            message = await connection.receive(SILENCE_SECONDS)
            # While we waited a newer connection of the node may have taken over; the older one is
            # not heard any more.
            if self._current.get(node) is connection:
                self._tell(_input(node, message))

    async def _lead(self) -> None:
        while True:
            await asyncio.sleep(LEAD_SECONDS)
            for node in tuple(self._current):
                self.send(node, LeaderLease(self._leader))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _input(node: str, message: Message) -> Input:
    match message:
        case NumberedFact(number=number, fact=fact):
            return FactReceived(node, number, fact)
        case Heartbeat():
            return HeartbeatReceived(node, message)
        case RankFact(generation=generation, fact=Metrics(line=line)) if is_metrics_line(line):
            return MetricsReceived(node, generation, line)
    raise LinkRefused(f"{node} told {message.kind!r}, which an agent does not tell")
