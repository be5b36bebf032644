"""A rank that goes back in place, as its agent sees it."""

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.protocol.commands import Kill, Relay
from opt_train.protocol.facts import InForce, OrderObeyed, RankExited, RankFact
from opt_train.protocol.orders import RollBack
from opt_train.supervisor.inputs import FactReceived
from tests.agent.harness import SupervisorEnd, begin, leave, play, start_agent
from tests.agent.test_agent import all_obeyed


@pytest.mark.parametrize("killed", [1, 2])
def test_a_rank_that_goes_back_is_another_generation_and_still_dies_as_the_old(
    run: RunDirectory, killed: int
) -> None:
    """Whoever ends generation 1 has not heard of the rollback, and means this process."""

    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run))
            warm = await listener.until(lambda: (s := listener.slot()) and s.step > 1 and s)
            listener.server.send("node-1", Relay(1, RollBack(1, "it climbs", 0, "1.01", 2)))
            slot = await listener.until(lambda: (s := listener.slot()) and s.generation == 2 and s)
            assert (slot.attempt, slot.rank, slot.pid) == ("1.01", 0, warm.pid)
            reported = [
                (i.fact.generation, i.fact.attempt, i.fact.fact)
                for i in listener.inputs
                if isinstance(i, FactReceived) and isinstance(i.fact, RankFact)
            ]
            said = [(g, a) for g, a, fact in reported if isinstance(fact, OrderObeyed)]
            assert said == [(1, "1.00")]
            said = [(g, a) for g, a, fact in reported if isinstance(fact, InForce)]
            assert said == [(1, "1.00"), (2, "1.01")]
            # Sent again by a link that stood still, say: it is that one.
            listener.server.send("node-1", begin(run, generation=2))
            await all_obeyed(listener)
            assert (s := listener.slot()) is not None
            assert s.pid == warm.pid
            listener.server.send("node-1", Kill(killed, stacks=False))
            exited = await listener.fact(RankExited)
            assert (exited.generation, exited.signal) == (2, 9)
            await leave(listener, agent)

    play(scene())
