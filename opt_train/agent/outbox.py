"""What an agent has not delivered yet: facts until the supervisor acknowledges them, metrics as
long as there is room.

Facts are numbered and must arrive: they wait, and are sent once more on every new connection. A
supervisor acknowledges a fact when what came of it is durable, so that none is lost with it.
Metrics lines are many, and a lost one is a gap in a plot: they are sent once, and the newest few
again on a new connection. (attempt, step) is a line's key, so that sending twice is harmless.
"""

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
METRICS_SENT_AGAIN = 256
"""Lines sent again on a new connection: they may have been lost with the old one."""
RANK_FACTS_KEPT = 20_000
"""A rank that floods its pipe with facts must not take the node's memory."""

log = logging.getLogger(__name__)


class Outbox:
    """Numbered facts and metrics lines of one agent, in the order they came."""

    def __init__(self) -> None:
        # Numbers grow over the lives of a node's agents too, so that a new agent's facts are not
        # taken for old ones.
        self._numbers = itertools.count(time.time_ns() // 1_000_000)
        self._facts: dict[int, NumberedFact] = {}
        self._metrics: deque[RankFact] = deque(maxlen=METRICS_KEPT)
        self._metrics_sent = 0
        self._news = asyncio.Event()
        self.dropped = 0

    def add(self, fact: Message) -> None:
        """Keep `fact`, numbered, until it is acknowledged."""
        if isinstance(fact, RankFact) and len(self._facts) >= RANK_FACTS_KEPT:
            self.dropped += 1
            if self.dropped.bit_count() == 1:
                # The 1st, 2nd, 4th, 8th: a flood must not fill the log.
                log.error("%d facts of ranks dropped: nobody acknowledges them", self.dropped)
            return
        number = next(self._numbers)
        self._facts[number] = NumberedFact(number, fact)
        self._news.set()

    def add_metrics(self, metrics: RankFact) -> None:
        """Queue a metrics line."""
        if len(self._metrics) == METRICS_KEPT and self._metrics_sent > 0:
            self._metrics_sent -= 1  # the oldest line falls out
        self._metrics.append(metrics)
        self._news.set()

    def acknowledge(self, number: int) -> None:
        """Forget facts up to `number`."""
        for old in [n for n in self._facts if n <= number]:
            del self._facts[old]

    async def deliver(self, connection: Connection, caught_up: asyncio.Event) -> None:
        """Send everything there is, and whatever comes, until the connection ends (`LinkRefused`)
        or is cancelled.

        A fact follows the metrics that came before it: behind a rank's end nobody would take its
        last lines any more. `caught_up` is set when all that had waited has been sent.
        """
        newest = -1
        self._metrics_sent = max(0, self._metrics_sent - METRICS_SENT_AGAIN)
        while True:
            self._news.clear()
            while self._metrics_sent < len(self._metrics):
                connection.send(self._metrics[self._metrics_sent])
                self._metrics_sent += 1
                self._forget_old_metrics()
                await connection.drain()
            for number, fact in [(n, f) for n, f in self._facts.items() if n > newest]:
                connection.send(fact)
                newest = number
                await connection.drain()
            caught_up.set()
            if all(n <= newest for n in self._facts):
                await self._news.wait()

    def _forget_old_metrics(self) -> None:
        while self._metrics_sent > METRICS_SENT_AGAIN:
            self._metrics.popleft()
            self._metrics_sent -= 1
