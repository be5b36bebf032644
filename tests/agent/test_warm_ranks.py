"""When an agent warms the rank that comes next, and what becomes of it."""

import asyncio
from collections.abc import Callable

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent import rank_slot as slots
from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_slot import RankSlot
from opt_train.agent.rank_starter import RankStarter
from opt_train.protocol.commands import Kill
from opt_train.protocol.facts import RankExited
from opt_train.supervisor.inputs import MetricsReceived
from tests.agent.harness import SupervisorEnd, begin, leave, make_starter, play, start_agent


def make_slot(
    run: RunDirectory, starter: RankStarter, changed: Callable[[], None] = lambda: None
) -> RankSlot:
    """One without an agent."""
    return RankSlot(
        0,
        starter,
        run,
        run.logs / "warm" / "node-1",
        LogCopies(run),
        add_fact=lambda _: None,
        add_metrics=lambda _: None,
        keep_snapshot=lambda *_: None,
        changed=changed,
    )


def test_begin_waits_for_a_rank_that_still_warms_and_is_obeyed_once(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            for _ in range(3):
                listener.server.send("node-1", begin(run, steps=1000))
            await listener.until(
                lambda: (s := listener.slot()) and s.stage == "running" and s.step > 2
            )
            assert {i.generation for i in listener.inputs if isinstance(i, MetricsReceived)} == {1}
            who = (run.path / "who_trains.log").read_text().split("\n")
            assert len(set(who)) == len(who), "two processes trained the same step"
            await leave(listener, agent)

    play(scene())


def test_the_next_rank_warms_beside_the_first_and_takes_over_at_once(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, step_seconds=0.05))
            await listener.until(
                lambda: (s := listener.slot()) and s.stage == "running" and s.spare
            )
            listener.server.send("node-1", Kill(1, stacks=False))
            listener.server.send("node-1", begin(run, generation=2, steps=1000))
            await listener.until(
                lambda: (s := listener.slot()) and s.generation == 2 and s.step > 1
            )
            assert [e.generation for e in listener.facts(RankExited)] == [1]
            await leave(listener, agent)

    play(scene())


def test_a_warm_rank_that_cannot_import_is_tried_again_and_then_reported_as_the_ranks_death(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run, STDLIB_RANK_FAILS="1")
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run))
            exited = await listener.fact(RankExited)
            assert (exited.code, exited.phase, exited.generation) == (1, "start", 1)
            assert "ImportError" in exited.log_tail[-1].text
            assert exited.log_tail[-1].file.startswith("logs/warm/node-1/")
            await leave(listener, agent)

    play(scene())


def test_warm_ranks_are_still_tried_after_a_night_in_which_all_died(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_BACKOFF_SECONDS_MAX", 0.01)

    async def scene() -> None:
        changes: list[str] = []
        starter = make_starter(run, STDLIB_RANK_FAILS="1")
        slot = make_slot(run, starter, lambda: changes.append(slot.state().stage))
        slot._warm_ranks_lost = 1100  # at most 30 s apart
        slot.open()
        while changes.count("warming") < 3:
            await asyncio.sleep(0.01)
        await slot.close()
        await starter.close()

    play(scene())
