"""What an agent still has to tell: facts until the supervisor acknowledges them, metrics as long as
there is room."""

import asyncio
import itertools
import logging
import time
from collections import deque

from opt_train.link.connection import Connection
from opt_train.protocol.facts import NumberedFact, RankFact
from opt_train.protocol.framing import Message

METRICS_KEPT = 10_000
"""Metrics lines that wait for a supervisor; the oldest go first."""
METRICS_TOLD_AGAIN = 256
"""Lines told again on a new connection: they may have been lost with the old one. Told twice is
harmless."""
RANK_FACTS_KEPT = 20_000
"""A rank that floods its pipe with facts must not take the node's memory."""

log = logging.getLogger(__name__)


class Outbox:
    """Numbered facts and metrics lines of one agent."""

    def __init__(self) -> None:
        # Numbers grow over the lives of a node's agents too, so that a new agent's facts are not
        # taken for old ones.
        self._numbers = itertools.count(time.time_ns() // 1_000_000)
        self._facts: dict[int, NumberedFact] = {}
        self._metrics: deque[RankFact] = deque(maxlen=METRICS_KEPT)
        self._metrics_told = 0
        self._news = asyncio.Event()
        self.dropped = 0

    def tell(self, fact: Message) -> None:
        """Keep `fact`, numbered, until it is acknowledged."""
        if isinstance(fact, RankFact) and len(self._facts) >= RANK_FACTS_KEPT:
            self.dropped += 1
            if self.dropped.bit_count() == 1:
                log.error("%d facts of ranks dropped: nobody acknowledges them", self.dropped)
            return
        number = next(self._numbers)
        self._facts[number] = NumberedFact(number, fact)
        self._news.set()

    def relay(self, metrics: RankFact) -> None:
        """Queue a metrics line."""
        if len(self._metrics) == METRICS_KEPT and self._metrics_told > 0:
            self._metrics_told -= 1  # the oldest line falls out
        self._metrics.append(metrics)
        self._news.set()

    def acknowledge(self, number: int) -> None:
        """Forget facts up to `number`."""
        for told in [n for n in self._facts if n <= number]:
            del self._facts[told]

    @property
    def unacknowledged(self) -> int:
        return len(self._facts)

    async def deliver(self, connection: Connection, caught_up: asyncio.Event) -> None:
        """Send everything there is, and whatever comes, until the connection ends (`LinkRefused`)
        or is cancelled.

        A fact follows the metrics that came before it: behind a rank's end nobody would take its
        last lines any more. `caught_up` is set when all that had waited has been sent.
        """
        newest = -1
        self._metrics_told = max(0, self._metrics_told - METRICS_TOLD_AGAIN)
        while True:
            self._news.clear()
            while self._metrics_told < len(self._metrics):
                connection.send(self._metrics[self._metrics_told])
                self._metrics_told += 1
                self._forget_old_metrics()
                await connection.drain()
            for number, told in [(n, t) for n, t in self._facts.items() if n > newest]:
                connection.send(told)
                newest = number
                await connection.drain()
            caught_up.set()
            if all(n <= newest for n in self._facts):
                await self._news.wait()

    def _forget_old_metrics(self) -> None:
        while self._metrics_told > METRICS_TOLD_AGAIN:
            self._metrics.popleft()
            self._metrics_told -= 1
