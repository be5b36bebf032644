"""A real agent and real processes in its slots, led by a real server: what must hold whatever the
ranks do."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.host.processes import stat_of
from opt_train.protocol.commands import Begin, Kill, Relay
from opt_train.protocol.facts import (
    ExitNotice,
    GenerationGone,
    InForce,
    RankExited,
    Stacks,
    Store,
)
from opt_train.protocol.orders import SaveAndStop
from opt_train.supervisor.inputs import (
    AgentConnected,
    HeartbeatReceived,
    MetricsReceived,
)
from tests.agent.harness import SupervisorEnd, begin, leave, make_run, play, start_agent
from tests.processes import processes_of


async def all_obeyed(listener: SupervisorEnd) -> None:
    """Commands are carried out in order: when this one is answered, those before it have been."""
    listener.server.send("node-1", Kill(0, stacks=False))
    await listener.until(lambda: GenerationGone(0) in listener.facts(GenerationGone))


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_warm_process_becomes_the_rank_and_its_facts_arrive(
    run: RunDirectory, transport: str
) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run, transport=transport) as listener:
            await listener.connected()
            warm = await listener.until(lambda: (s := listener.slot()) and s.stage == "warm" and s)
            assert warm.spare
            assert warm.rank == -1
            listener.server.send("node-1", begin(run, steps=5))
            exited = await listener.fact(RankExited)
            assert exited.pid == warm.pid, (
                "a restart must not pay for an import: the warm process is the rank"
            )
            assert (exited.code, exited.signal, exited.killed_by_agent) == (0, None, False)
            assert exited.leaving == ExitNotice(0, 4, "done")
            assert exited.log_tail[0].file == "logs/1.00/node-1/rank0.log"
            assert exited.log_tail[0].line == 1
            assert "begins" in exited.log_tail[0].text
            assert listener.facts(Store) == [Store("127.0.0.1", 4242)]
            assert listener.facts(InForce) == [InForce({"lr": 0.1})]
            # A rank's facts and its metrics lines go separate ways: its end may come before its
            # last lines.
            await listener.until(
                lambda: len([i for i in listener.inputs if isinstance(i, MetricsReceived)]) >= 5
            )
            steps = [i.line["step"] for i in listener.inputs if isinstance(i, MetricsReceived)]
            assert steps == [0, 1, 2, 3, 4]
            await leave(listener, agent)

    play(scene())


def test_a_newer_generation_ends_the_one_that_runs_in_its_slot(run: RunDirectory) -> None:
    """A kill may be lost with a link: no begin may find, or wait for, ranks of the generation
    before."""

    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, step_seconds=0.05, steps=10_000))
            await listener.until(
                lambda: (s := listener.slot()) and s.generation == 1 and s.step > 1
            )
            listener.server.send("node-1", begin(run, generation=2, steps=1000))
            await listener.until(
                lambda: (s := listener.slot()) and s.generation == 2 and s.step > 1
            )
            assert [(e.generation, e.killed_by_agent) for e in listener.facts(RankExited)] == [
                (1, True)
            ]
            await leave(listener, agent)

    play(scene())


def test_unacknowledged_facts_come_again_on_a_new_connection_and_acknowledged_ones_do_not(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run, leader=1) as first:
            await first.connected()
            first.server.send("node-1", begin(run, steps=1000, step_seconds=0.02))
            await first.fact(InForce)
            first.acknowledge_all()
            await first.until(lambda: (s := first.slot()) and s.step > 3)
            first.server.send("node-1", Kill(1, stacks=False))
            await first.fact(GenerationGone)
        async with SupervisorEnd(run, leader=2) as second:
            state = (await second.connected()).state
            assert state.leader_generation == 2
            await second.fact(GenerationGone)
            assert [e.generation for e in second.facts(RankExited)] == [1]
            assert not second.facts(InForce), "an acknowledged fact was sent again"
            await leave(second, agent)

    play(scene())


def test_metrics_of_the_time_without_a_supervisor_arrive_with_the_next_one(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run, leader=1) as first:
            await first.connected()
            first.server.send("node-1", begin(run, steps=60, step_seconds=0.02))
            await first.until(lambda: (s := first.slot()) and s.step > 3)
        await asyncio.sleep(0.5)
        async with SupervisorEnd(run, leader=2) as second:

            def known() -> set[int]:
                return {
                    i.line["step"]
                    for i in first.inputs + second.inputs
                    if isinstance(i, MetricsReceived)
                }

            await second.fact(RankExited)
            await second.until(lambda: known() == set(range(60)))
            await leave(second, agent)

    play(scene())


def test_a_supervisor_that_was_succeeded_is_not_obeyed(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run, leader=5) as newer:
            await newer.connected()
        async with SupervisorEnd(run, leader=4) as older:
            await asyncio.sleep(2.0)
            assert not [i for i in older.inputs if isinstance(i, AgentConnected)]
        async with SupervisorEnd(run, leader=5) as newer:
            await newer.connected()
            await leave(newer, agent)

    play(scene())


@pytest.mark.parametrize("stopped", [False, True])
def test_a_deaf_or_stopped_generation_dies_on_command(run: RunDirectory, stopped: bool) -> None:
    async def scene() -> None:
        agent = start_agent(run, slots=2)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            for rank in (0, 1):
                listener.server.send(
                    "node-1", begin(run, rank=rank, slot=rank, deaf=True, child=True)
                )
            states = await listener.until(
                lambda: (
                    (a := listener.slot(0))
                    and (b := listener.slot(1))
                    and min(a.step, b.step) > 0
                    and (a, b)
                )
            )
            if stopped:
                os.kill(states[1].pid, signal.SIGSTOP)
                await listener.until(lambda: (stat := stat_of(states[1].pid)) and stat.state == "T")
            asked = time.monotonic()
            listener.server.send("node-1", Kill(1, stacks=True))
            assert (await listener.fact(GenerationGone)).generation == 1
            assert time.monotonic() - asked < 15.0
            exits = {e.rank: e for e in listener.facts(RankExited)}
            assert {(e.signal, e.killed_by_agent) for e in exits.values()} == {
                (signal.SIGKILL, True)
            }
            stacks = {s.rank: s for s in listener.facts(Stacks)}
            assert stacks[0].answered
            assert any("stdlib_rank.py" in line.text for line in stacks[0].tail)
            assert stacks[1].answered is not stopped
            assert (stacks[1].process_state == "T") is stopped
            for state in states:
                gone = stat_of(state.pid)
                assert gone is None or gone.parent != agent.pid
            await leave(listener, agent)

    play(scene())


def test_a_rank_that_dies_by_itself_is_reported_with_its_log_and_is_not_called_killed(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, exit_at=3, exit_code=1))
            exited = await listener.fact(RankExited)
            assert (exited.code, exited.signal, exited.leaving) == (1, None, None)
            assert (exited.phase, exited.step) == ("step", 3)
            assert (exited.log_tail[-1].line, exited.log_tail[-1].text) == (
                2,
                "RuntimeError: boom <b>",
            )
            # What comes late, and twice, begins no generation again.
            await listener.until(lambda: (s := listener.slot()) and s.stage == "warm")
            listener.server.send("node-1", begin(run, exit_at=3, exit_code=1))
            await all_obeyed(listener)
            listener.server.send("node-1", begin(run, generation=2, step_seconds=0.05))
            running = await listener.until(
                lambda: (s := listener.slot()) and s.generation == 2 and s.step > 0 and s
            )
            os.kill(running.pid, signal.SIGKILL)
            second = await listener.until(
                lambda: [e for e in listener.facts(RankExited) if e.generation == 2]
            )
            assert (second[0].signal, second[0].killed_by_agent) == (signal.SIGKILL, False)
            assert len(listener.facts(RankExited)) == 2
            await leave(listener, agent)

    play(scene())


def test_an_order_reaches_rank_0_and_its_obedience_comes_back(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run))
            await listener.until(lambda: (s := listener.slot()) and s.step > 0)
            listener.server.send("node-1", Relay(7, SaveAndStop(1, "of another generation")))
            listener.server.send("node-1", Relay(1, SaveAndStop(2, "enough")))
            exited = await listener.fact(RankExited)
            assert exited.code == 75
            assert exited.leaving is not None
            assert exited.leaving.code == 75
            await leave(listener, agent)

    play(scene())


def test_garbage_on_the_pipe_is_counted_and_harms_nothing(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, steps=3, garbage=30))
            exited = await listener.fact(RankExited)
            assert exited.code == 0
            assert listener.facts(InForce) == [InForce({"lr": 0.1})], (
                "the fact after the garbage was lost"
            )
            await leave(listener, agent)
        assert "30 lines that are no facts" in (run.nodes / "node-1" / "agent.log").read_text()

    play(scene())


def test_a_rank_that_floods_its_pipe_silences_neither_agent_nor_neighbour(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run, slots=2)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, rank=0, slot=0, flood=True))
            listener.server.send("node-1", begin(run, rank=1, slot=1, step_seconds=0.02))
            await listener.until(lambda: (s := listener.slot(1)) and s.step > 20)
            await asyncio.sleep(1.0)
            status = Path(f"/proc/{agent.pid}/status").read_text()
            assert int(status.partition("VmRSS:")[2].split()[0]) < 200_000, (
                "the flood is kept in memory"
            )
            listener.server.send("node-1", Kill(1, stacks=False))
            await listener.fact(GenerationGone)
            await leave(listener, agent)

    play(scene())


def test_a_run_directory_that_takes_no_logs_keeps_no_rank_from_training(run: RunDirectory) -> None:
    """What it wrote is reported all the same, and is in its log as soon as that can be."""
    log = run.rank_log("1.00", "node-1", 0)
    run.logs.mkdir()
    log.parent.parent.write_text("a file where the attempt's folder should be")

    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, steps=5))
            exited = await listener.fact(RankExited)
            assert exited.leaving == ExitNotice(0, 4, "done")
            assert "begins" in exited.log_tail[0].text
            assert not log.exists()
            log.parent.parent.unlink()
            await leave(listener, agent)
            assert log.read_text().startswith("rank 0 of generation 1 begins\n")

    play(scene())


def test_a_rank_that_dies_while_its_stacks_are_asked_for_takes_nobody_along(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", begin(run, dies_when_asked=True))
            await listener.until(lambda: (s := listener.slot()) and s.step >= 0)
            listener.server.send("node-1", Kill(1, stacks=True))
            exited = await listener.fact(RankExited)
            assert (exited.signal, exited.log_tail[0].text) == (
                signal.SIGUSR2,
                "rank 0 of generation 1 begins",
            )
            assert not (await listener.fact(Stacks)).answered
            await listener.fact(GenerationGone)
            await asyncio.sleep(0.5)
            assert agent.poll() is None
            await leave(listener, agent)

    play(scene())


async def trains(listener: SupervisorEnd, run: RunDirectory) -> None:
    """Until its agent's rank has taken some steps."""
    await listener.connected()
    listener.server.send("node-1", begin(run))
    await listener.until(lambda: (s := listener.slot()) and s.step > 5)


def test_orphans_kill_their_ranks_and_leave(tmp_path: Any) -> None:
    run = make_run(tmp_path, orphan_seconds=4.0)

    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await trains(listener, run)
            await asyncio.sleep(4.5)
            assert agent.poll() is None, "a led agent stays, however long"
        await listener.until(lambda: agent.poll() is not None, seconds=30.0)
        assert agent.returncode == 0
        assert not processes_of(tmp_path)

    play(scene())


def test_orphans_leave_though_the_run_directory_stands_still(tmp_path: Path) -> None:
    """Whoever opens the fifo waits for ever, as on a file system whose server is gone with the
    supervisor."""
    run = make_run(tmp_path, orphan_seconds=2.0)

    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await trains(listener, run)
            run.supervisor_address.unlink()
            os.mkfifo(run.supervisor_address)
        try:
            await listener.until(lambda: agent.poll() is not None, seconds=20.0)
        finally:
            agent.kill()
        assert not processes_of(tmp_path)
        told = (run.nodes / "node-1" / "agent.log").read_text()
        assert "the node stays registered: the run directory does not answer" in told

    play(scene())


def test_the_death_of_an_agent_takes_its_ranks_along(run: RunDirectory, tmp_path: Any) -> None:
    async def scene() -> None:
        agent = start_agent(run, slots=2)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            for rank in (0, 1):
                listener.server.send("node-1", begin(run, rank=rank, slot=rank, deaf=True))
            await listener.until(lambda: (s := listener.slot(1)) and s.step > 0 and s.spare)
            agent.kill()
            agent.wait()
            # Fails with what was told last if ranks or spares outlive their agent.
            await listener.until(lambda: not processes_of(tmp_path))

    play(scene())


def test_signals_of_a_scheduler_do_not_end_an_agent(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(agent.pid, number)
            await asyncio.sleep(0.3)
            assert agent.poll() is None
            await leave(listener, agent)

    play(scene())


def test_a_node_has_one_agent(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            second = start_agent(run)
            await listener.until(lambda: second.poll() is not None)
            assert second.returncode == 1
            assert agent.poll() is None
            await leave(listener, agent)

    play(scene())


def test_an_older_generation_is_not_begun_again(run: RunDirectory) -> None:
    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            listener.server.send("node-1", Kill(3, stacks=False))
            await listener.fact(GenerationGone)
            # A warm process would take the order at once.
            await listener.until(lambda: (s := listener.slot()) and s.stage == "warm")
            late: Begin = begin(run, generation=2)
            listener.server.send("node-1", late)
            await all_obeyed(listener)
            count = len(listener.inputs)
            pulse = await listener.until(
                lambda: next(
                    (
                        i.heartbeat
                        for i in listener.inputs[count:]
                        if isinstance(i, HeartbeatReceived)
                    ),
                    None,
                )
            )
            assert (pulse.slots[0].stage, pulse.slots[0].generation) == ("warm", 0)
            assert not listener.facts(RankExited)
            assert not (run.path / "who_trains.log").exists()
            await leave(listener, agent)

    play(scene())


def test_an_agent_imports_no_torch() -> None:
    code = "import sys, opt_train.agent.agent; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
