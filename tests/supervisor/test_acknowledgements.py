"""A fact is forgotten when it is durable: never one that nobody knows, and none is forgotten to be
decided about."""

import logging
from dataclasses import dataclass, replace

import pytest

from opt_train.protocol import facts
from opt_train.protocol.facts import (
    FACTS_OF_A_RANK,
    AgentState,
    Heartbeat,
    Metrics,
    NodeFinding,
    NumberedFact,
    Phase,
    Progress,
    RankFact,
    RolledBack,
    SnapshotTaken,
    Store,
    Warm,
)
from opt_train.protocol.framing import Message
from opt_train.run.attempt import Attempt
from opt_train.run.state import RunState
from opt_train.simulation.world import World
from opt_train.supervisor.inputs import FactReceived, Now
from opt_train.supervisor.rules.acknowledgements import SETTLED, acknowledge, is_settled
from opt_train.supervisor.rules.context import Context

UNNUMBERED = {Warm, Phase, Progress, SnapshotTaken, RolledBack, Metrics, AgentState, Heartbeat}
"""What a rank says for its agent alone, what may be lost, and what an agent says whole each
time."""
WRAPPERS = {RankFact, NumberedFact}


@dataclass(frozen=True, slots=True)
class Later(Message):
    """A fact of a newer version."""

    kind = "later"


def a_context(state: RunState) -> Context:
    world = World()
    world.start_supervisor()
    assert world.core is not None
    return Context(state, world.core.view, world.config, world.core.identity)


def test_every_fact_is_in_the_table_or_never_numbered() -> None:
    """One that is in neither would hold back every acknowledgement behind it."""
    written = {c for c in Message.registry.values() if c.__module__ == facts.__name__}
    assert set(SETTLED) == written - UNNUMBERED - WRAPPERS
    assert set(FACTS_OF_A_RANK) <= set(SETTLED) | UNNUMBERED


@pytest.mark.parametrize("lives", [True, False])
def test_a_fact_that_nobody_knows_is_never_settled(lives: bool) -> None:
    attempt = Attempt("1.00", 1, 0, ("n0",), 1, outcome="" if lives else "failed")
    context = a_context(replace(RunState(), attempt=attempt))
    assert not is_settled(context, Later())
    assert not is_settled(context, RankFact(1, "1.00", 0, Later()))


def test_a_fact_that_nobody_knows_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    context = a_context(RunState())
    with caplog.at_level(logging.WARNING, "opt_train"):
        for number, fact in enumerate((Store("h", 1), Later(), Later()), 1):
            received = FactReceived("n0", number, RankFact(1, "1.00", 0, fact))
            context.view.apply_input(received, Now(1.0, 1.0), context.state)
    assert [record.getMessage().count("'later'") for record in caplog.records] == [1]
    (decision,) = acknowledge(context)
    assert decision.number == 1, "what lies behind it is kept too"  # type: ignore[union-attr]


def test_a_finding_is_a_fact_that_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """An ECC error was logged as something that means nothing here."""
    context = a_context(RunState())
    with caplog.at_level(logging.WARNING, "opt_train"):
        finding = NodeFinding("gpu_ecc", "uncontained", permanent=True, confidence=1.0)
        context.view.apply_input(FactReceived("n0", 1, finding), Now(1.0, 1.0), context.state)
    assert caplog.records == []
