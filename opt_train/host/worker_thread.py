"""One thread beside the event loop, for what waits for a disk or takes long: reading, hashing,
writing, in pieces."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


class WorkerThread:
    """Does one job after another, in the order given, whether somebody still waits for it or not.

    So a job that cleans up may be given and forgotten: it is done after all that was given before.
    Long work is given in pieces, which lets others in between and makes it easy to cancel. The
    thread starts with the first job. It is a daemon: one that hangs in a dead file system keeps
    nobody from leaving.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        """What `work(*arguments)` returns or raises, as a future of the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(_retrieve_error)
        self._jobs.put(_Job(loop, future, work, arguments))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="helper", daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """End the thread when all that was given is done; waits for nothing."""
        self._jobs.put(None)
        self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            result, error = None, None
            try:
                result = job.work(*job.arguments)
            except Exception as raised:  # it belongs to whoever waits for the future
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.loop.call_soon_threadsafe(_settle, job.future, result, error)
            del job, result, error


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _retrieve_error(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.exception()  # asyncio would complain of an error that nobody waited for
