"""Starting a rank's process through the node's fork server, and what becomes of it."""

import asyncio
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.rank_process import RankProcess
from opt_train.agent.rank_starter import RankStarter
from opt_train.host.processes import stat_of
from opt_train.host.worker_thread import WorkerThread
from tests.agent.harness import make_starter
from tests.agent.snapshots.stores import content, play


def start(starter: RankStarter) -> RankProcess:
    return RankProcess(starter, lambda *_: None, lambda _: None)


def text_of(process: RankProcess) -> str:
    return process.log.read(0, process.log.size).decode()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def server_of(starter: RankStarter) -> int:
    """The pid of its fork server."""
    assert starter._process is not None
    return starter._process.pid


def test_ranks_are_the_agents_children_with_an_exit_code_a_group_and_a_log_each(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        starter = make_starter(run, "odd_rank", ODD_RANK="exits")
        processes = [start(starter) for _ in range(8)]
        assert [process.process_state for process in processes] == [""] * 8
        for process in processes:
            await process.ended.wait()
            assert process.returncode == 7
            assert text_of(process) == f"parent {os.getpid()} threads 1\n"
        assert len({process.pid for process in processes}) == 8
        await starter.close()

    play(scene())


def test_what_a_dead_server_forked_lives_on_and_the_next_rank_has_a_new_one(
    run: RunDirectory,
) -> None:
    async def scene() -> None:
        starter = make_starter(run, "odd_rank", ODD_RANK="waits")
        first = start(starter)
        await until(lambda: first.pid)
        dead = server_of(starter)
        os.kill(dead, signal.SIGKILL)
        await until(lambda: starter._process is None)
        second = start(starter)
        await until(lambda: second.pid)
        assert server_of(starter) != dead
        assert {first.process_state, second.process_state} <= {"R", "S"}
        for process in (first, second):
            assert os.getpgid(process.pid) == process.pid
            process.kill()
            await process.ended.wait()
            assert process.returncode == -signal.SIGKILL
            assert process.killed_by_agent
        await starter.close()

    play(scene())


def test_a_rank_that_is_not_wanted_any_more_when_it_is_forked_is_killed(run: RunDirectory) -> None:
    async def scene() -> None:
        starter = make_starter(run, "odd_rank", ODD_RANK="waits")
        process = start(starter)
        process.kill()
        assert not process.pid
        await process.ended.wait()
        assert process.returncode == -signal.SIGKILL
        unforked = start(starter)
        await starter.close()
        assert unforked.ended.is_set()
        assert stat_of(unforked.pid) is None

    play(scene())


def test_imports_that_fail_end_each_rank_that_was_asked_for_and_say_why(run: RunDirectory) -> None:
    async def scene() -> None:
        starter = make_starter(run, "odd_rank", ODD_RANK="cannot be imported")
        processes = [start(starter) for _ in range(2)]
        for process in processes:
            await process.ended.wait()
            assert process.returncode == 1
            assert text_of(process).endswith(
                "ImportError: libcudart.so.13: cannot open shared object file\n"
            )
        await starter.close()

    play(scene())


def test_where_imports_start_a_thread_each_rank_imports_for_itself(run: RunDirectory) -> None:
    """A child of a process with threads may wait for ever for a lock of one of them."""

    async def scene() -> None:
        starter = make_starter(run, "odd_rank", ODD_RANK="imports a thread")
        process = start(starter)
        await process.ended.wait()
        assert process.returncode == 7
        assert text_of(process) == (
            "this rank imports by itself: its imports have started 1 threads\n"
            f"parent {os.getpid()} threads 2\n"
        )
        await starter.close()

    play(scene())


def test_a_forked_rank_computes_on_several_threads(run: RunDirectory) -> None:
    """It would wait for ever if the fork server had done so before."""

    async def scene() -> None:
        variables = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
        starter = make_starter(run, "odd_rank", ODD_RANK="computes", **variables)
        for _ in range(2):
            process = start(starter)
            await process.ended.wait()
            assert process.returncode == 7, text_of(process)
            assert "imports by itself" not in text_of(process)
        await starter.close()

    play(scene())


def test_the_trainer_is_fit_to_be_forked(run: RunDirectory) -> None:
    """Else each rank imports by itself, and nobody notices but those who wait."""

    async def scene() -> None:
        variables = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
        starter = make_starter(run, "opt_train.train.warm", **variables)
        process = start(starter)
        await until(lambda: process.pid)
        pages = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"opt_train.agent.fork_server" in pages, "it has become another program"
        process.kill()
        await process.ended.wait()
        assert "imports by itself" not in text_of(process)
        await starter.close()

    play(scene())


def test_ranks_start_while_the_worker_thread_hashes(run: RunDirectory) -> None:
    """Between fork and exec a child of a process with threads may wait for ever for a lock of one
    of them: so may the fork server, which the agent starts."""
    data = content(1)

    async def scene() -> None:
        worker = WorkerThread()

        async def hash_for_ever() -> None:
            while True:
                await worker.do(lambda: hashlib.sha256(data).hexdigest())

        hashing = asyncio.create_task(hash_for_ever())
        for _ in range(30):
            starter = make_starter(run, "odd_rank", ODD_RANK="exits")
            process = start(starter)
            await process.ended.wait()
            assert process.returncode == 7
            await starter.close()
        hashing.cancel()
        worker.close()

    play(scene())
