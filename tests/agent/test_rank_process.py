"""Starting a rank's process from an agent that has threads."""

import asyncio
import hashlib
import os

import pytest

from opt_train.agent.rank_process import RankProcess
from opt_train.host.worker_thread import WorkerThread
from tests.agent.snapshots.stores import content, play

pytestmark = pytest.mark.timeout(90)


def test_ranks_start_while_the_worker_thread_hashes() -> None:
    """Between fork and exec a child of a process with threads may wait for ever for a lock of one
    of them."""
    data = content(1)

    async def scene() -> None:
        worker = WorkerThread()
        codes: list[int | None] = []

        async def hash_for_ever() -> None:
            while True:
                await worker.do(lambda: hashlib.sha256(data).hexdigest())

        hashing = asyncio.create_task(hash_for_ever())
        for _ in range(60):
            process = RankProcess(
                ["sh", "-c", "exit 7"], os.environ, lambda *_: None, lambda _: None
            )
            await process.ended.wait()
            codes.append(process.returncode)
        hashing.cancel()
        worker.close()
        assert codes == [7] * 60

    play(scene())
