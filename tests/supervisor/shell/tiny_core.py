"""The smallest core that runs: it starts one generation on one node, stops when told, and remembers
what it heard."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from opt_logbook.record.events import Entry, Note, SupervisorStarted

from opt_train.protocol.commands import Kill
from opt_train.protocol.facts import RankExited
from opt_train.supervisor.effects import (
    AcknowledgeFact,
    Append,
    Effect,
    Finish,
    Send,
    Show,
    StartAgent,
    WriteMetrics,
)
from opt_train.supervisor.inputs import (
    AgentConnected,
    FactReceived,
    HeartbeatReceived,
    Identity,
    InboxReceived,
    Input,
    MetricsReceived,
    Now,
    StopAsked,
    Tick,
)
from tests.agent.harness import begin


def entry(now: Now, event: Any) -> Append:
    return Append(Entry(round(now.wall, 3), "1.00", None, event))


class TinyCore:
    """Give `react` to add behaviour: it is called first and may answer with effects."""

    def __init__(
        self,
        run: Any,
        react: Callable[[Input, Now], list[Effect] | None] | None = None,
        **rank: Any,
    ) -> None:
        self.run, self.rank, self.react = run, rank, react
        self.inputs: list[tuple[float, Input]] = []
        self.identity: Identity | None = None
        self.is_new = True
        self.exited: set[str] = set()
        self.goes_on_after_stop = False

    def __call__(self, config: Any, state: Any, identity: Identity) -> "TinyCore":
        self.identity = identity
        self.is_new = state.created is None
        return self

    def begin(self, now: Now) -> list[Effect]:
        assert self.identity is not None
        started = SupervisorStarted(
            self.identity.leader, self.identity.host, self.identity.pid, "0", False
        )
        created = [entry(now, self.identity.created)] if self.is_new else []
        return [*created, entry(now, started), StartAgent("node-1")]

    def handle_all(self, inputs: Sequence[Input], now: Now) -> list[Effect]:
        return [effect for input_ in inputs for effect in self.handle(input_, now)]

    def handle(self, input_: Input, now: Now) -> list[Effect]:
        self.inputs.append((time.monotonic(), input_))
        answer = self.react(input_, now) if self.react else None
        if answer is not None:
            return answer
        match input_:
            case AgentConnected(node=node, state=state):
                if state.slots[0].stage == "running":
                    return [entry(now, Note("core", "adopted"))]
                return [entry(now, Note("core", "begin")), Send(node, begin(self.run, **self.rank))]
            case MetricsReceived(line=line):
                return [WriteMetrics("1.00", line)]
            case FactReceived(node=node, number=number, fact=RankExited(code=code)):
                # The last metrics may still be on their way. The pulses go on, and come behind
                # them.
                self.exited.add(node)
                return [AcknowledgeFact(node, number), entry(now, Note("core", f"exit {code}"))]
            case HeartbeatReceived(node=node) if node in self.exited:
                return [Finish(0, "done")]
            case FactReceived(node=node, number=number):
                return [AcknowledgeFact(node, number)]
            case InboxReceived(message=message):
                return [entry(now, Note(str(message.get("author")), str(message.get("text"))))]
            case StopAsked(by=by):
                return [
                    entry(now, Note("core", f"stop {by}")),
                    Send("node-1", Kill(1, False)),
                    Finish(75, "stopped"),
                ]
            case Tick():
                return [Show("training", 1, 2, 3.0, 4.0, 1, 0, "1.00", "")]
        return []

    def received_at(self, kind: type[Input]) -> list[float]:
        """When inputs of a kind came."""
        return [at for at, input_ in self.inputs if isinstance(input_, kind)]
