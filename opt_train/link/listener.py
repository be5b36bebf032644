"""How strangers are let in: whoever connects has a few seconds to prove the run's secret.

Nothing that a stranger does may harm the run or keep an honest peer out:

- A stranger's lines are short (`MAX_HANDSHAKE_BYTES`), so that a flood of them takes no memory.
- One deadline spans the whole admission. A deadline a line would let a peer that sends a byte now
  and then hold the door open for ever.
- Strangers are counted. Where there are `strangers_max`, the one that has waited longest makes room
  for the next: an honest peer proves itself in a moment, so a crowd that stands silent at the door
  keeps nobody out. Peers that have proved themselves are not counted: a full door does not end a
  link.
- What breaks the rules ends that connection alone.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import Endpoint, listen
from opt_train.link.secret import SecretUnusable

Peer = TypeVar("Peer")

log = logging.getLogger(__name__)


class AuthenticatedListener(Generic[Peer]):
    """Listens at an endpoint; `admit` turns a stranger into what `serve` needs to know of it."""

    def __init__(
        self,
        admit: Callable[[Connection], Awaitable[Peer]],
        serve: Callable[[Connection, Peer], Awaitable[None]],
        *,
        admission_seconds: float,
        strangers_max: int,
    ) -> None:
        """`admit` raises `LinkRefused`, `SecretUnusable` or OSError for who is not let in; `serve`
        deals with all that ends a proven peer's connection, which is closed when it returns."""
        self._admit, self._serve_peer = admit, serve
        self._admission_seconds, self._strangers_max = admission_seconds, strangers_max
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        """Connections that have not proved themselves, oldest first."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, endpoint: Endpoint, backlog: int) -> Endpoint:
        """Listen, and return the endpoint with the port that was chosen. Raises OSError."""
        self._server, bound = await listen(endpoint, self._accept, backlog)
        return bound

    async def stop(self) -> None:
        """Listen no more, and cut off everybody."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._strangers) >= self._strangers_max:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        # The loop keeps only weak references to tasks: one that nobody holds may vanish mid-way.
        task = asyncio.create_task(self._serve(Connection(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection) -> None:
        try:
            try:
                async with asyncio.timeout(self._admission_seconds):
                    peer = await self._admit(connection)
            finally:
                self._strangers.pop(connection.writer, None)
            await self._serve_peer(connection, peer)
        except (LinkRefused, SecretUnusable, TimeoutError, OSError) as refused:
            who = connection.node or "a stranger"
            log.info("%s is cut off: %s", who, str(refused) or "the handshake took too long")
        finally:
            connection.close()
