"""Rules of acknowledging facts: an agent may forget what is durable, and nothing else.

An agent keeps each numbered fact until it is acknowledged, and sends it again on every connection.
That is what lets a supervisor die: whatever it knew and had not journalled, its successor receives
again. So a fact is *settled*, and may be acknowledged, when no supervisor that folds the journal
would decide anything else for want of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from opt_train.protocol.facts import (
    ExitNotice,
    Fetched,
    GenerationGone,
    GpusSeen,
    InForce,
    NodeFinding,
    OrderObeyed,
    PreflightEnded,
    Probed,
    RankExited,
    RankFact,
    SaveFailed,
    ShardsSaved,
    SnapshotStored,
    Stacks,
    Store,
    Validation,
)
from opt_train.protocol.framing import Message
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.supervisor.effects import AcknowledgeFact
from opt_train.supervisor.rules.context import Context, Decision

IsSettled = Callable[[Context, Attempt, Any], bool]
"""Asked of a fact of the live attempt."""


def acknowledge(s: Context) -> list[Decision]:
    """Let agents forget what is durable, in order: a fact that still matters holds back those
    behind it."""
    decisions: list[Decision] = []
    for node in sorted(s.view.to_settle & s.view.pending):
        view = s.view.node(node)
        upto = view.acknowledged
        for number, fact in sorted(view.facts.items()):
            if not is_settled(s, fact):
                break
            upto = number
        # Also when nothing more is settled: a fact that came again shows that the last
        # acknowledgement was lost, and the agent would send it on every connection.
        if upto > view.acknowledged or view.resent:
            decisions.append(AcknowledgeFact(node, upto))
    return decisions


def is_settled(s: Context, fact: Message) -> bool:
    """Whether nothing would be lost if `fact` were never sent again. What is not in `SETTLED` never
    is: to keep it costs an agent some memory, to lose it perhaps the run."""
    own = fact.fact if isinstance(fact, RankFact) else fact
    settled = SETTLED.get(type(own))
    if settled is None:
        return False
    live = s.state.live
    if live is None or getattr(fact, "generation", live.generation) != live.generation:
        # The attempt is over: its end is journalled, and so is what was made of its ranks' facts.
        return True
    return settled(s, live, own)


def _always(s: Context, live: Attempt, fact: Message) -> bool:
    """It answers a command, which is sent again if need be, and so is the answer; or it is part of
    what every agent tells on connecting."""
    return True


def _when_over(s: Context, live: Attempt, fact: Message) -> bool:
    """It is evidence: the diagnosis of the attempt's end may need it."""
    return False


def _when_noted(s: Context, live: Attempt, fact: Message) -> bool:
    """`findings.note` is looked through before `acknowledge` (table.py): it is in the journal."""
    return True


def _when_training(s: Context, live: Attempt, fact: Message) -> bool:
    return live.began


def _when_in_force(s: Context, live: Attempt, fact: Message) -> bool:
    return live.in_force


def _when_save_is_settled(s: Context, live: Attempt, fact: ShardsSaved | SaveFailed) -> bool:
    return path_of_save(live.name, fact.step) in s.state.settled_saves


def _when_snapshot_is_settled(s: Context, live: Attempt, fact: SnapshotStored) -> bool:
    return path_of_save(live.name, fact.step, MEMORY) in s.state.settled_saves


def _when_order_is_ended(s: Context, live: Attempt, fact: OrderObeyed) -> bool:
    return all(order.number != fact.number for order in s.state.outstanding_orders)


def _when_validation_is_measured(s: Context, live: Attempt, fact: Validation) -> bool:
    return (fact.name, fact.step) in s.state.validations


def _when_probe_is_on_record(s: Context, live: Attempt, fact: Probed) -> bool:
    return fact.order <= s.state.probed


SETTLED: Mapping[type[Message], IsSettled] = {
    Store: _when_training,
    InForce: _when_in_force,
    Validation: _when_validation_is_measured,
    ShardsSaved: _when_save_is_settled,
    SaveFailed: _when_save_is_settled,
    OrderObeyed: _when_order_is_ended,
    Probed: _when_probe_is_on_record,
    ExitNotice: _when_over,
    RankExited: _when_over,
    Stacks: _when_over,
    GenerationGone: _always,
    SnapshotStored: _when_snapshot_is_settled,
    Fetched: _always,
    NodeFinding: _when_noted,
    PreflightEnded: _always,
    GpusSeen: _always,
}
"""Every fact that an agent numbers, whether its own or its rank's -> when it is settled while the
attempt lives."""
