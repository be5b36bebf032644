"""The agent's end of its node's fork server: asks it for ranks, learns their pids."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from opt_train.agent.core_binding import format_cores
from opt_train.agent.fork_server import REQUEST_BYTES_MAX
from opt_train.agent.rank_log import LogCopies, RankLog
from opt_train.host.processes import adopt_orphans, die_with_parent

log = logging.getLogger(__name__)

Answer = Callable[[int, int, bytes], None]
"""Called with a new rank's pid, or with 0, an exit code, and what was said to explain it."""


class RankStarter:
    """Starts ranks of `module` by a fork server, which is itself started with the first one, and
    anew after its end."""

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        logs: LogCopies,
        log_folder: Path,
    ) -> None:
        """What the fork server says, about imports that fail, say, is copied to `log_folder`."""
        self._module, self._environment = module, environment
        self._logs, self._log_folder = logs, log_folder
        self._servers_started = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._log: RankLog
        self._requests = 0
        self._answers: dict[int, Answer] = {}

    def start(
        self,
        log_fd: int,
        facts_fd: int,
        control_fd: int,
        answer: Answer,
        cores: Collection[int] = (),
    ) -> None:
        """Ask for a rank that writes to the first two descriptors and reads the third; they may be
        closed afterwards. `answer` is called once. Raises OSError if that cannot be done.

        Args:
            cores: that it runs on; none: wherever the agent may.
        """
        near = self._socket or self._start_server()
        self._requests += 1
        asked = {"number": self._requests, "agent": os.getpid(), "cores": format_cores(cores)}
        request = json.dumps(asked).encode()
        # Until all are answered, what is left without a parent on this node is this process's.
        adopt_orphans(True)
        self._answers[self._requests] = answer
        try:
            socket.send_fds(near, [request], [log_fd, facts_fd, control_fd])
        except OSError:
            self._take_answer(self._requests)
            raise

    async def close(self) -> None:
        """End the fork server. Ranks that it has started live on; those still asked for have
        ended."""
        if self._process is not None:
            self._process.kill()
            self._end_server()

    def _start_server(self) -> socket.socket:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The agent waits for nobody: a server that imports takes requests later.
        near.setblocking(False)
        self._log = RankLog()
        command = [sys.executable, "-P", "-m", "opt_train.agent.fork_server", self._module]
        try:
            self._process = subprocess.Popen(
                [*command, "--socket-fd", str(far.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log.fileno(),
                stderr=subprocess.STDOUT,
                pass_fds=(far.fileno(),),
                env=dict(self._environment),
                process_group=0,
                # This must be the agent's main thread, which lives as long as the agent does. The
                # function is called between fork and exec, where another thread's locks would stay
                # locked for ever: it takes none (see there).
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509
            )
        except BaseException:
            near.close()
            raise
        finally:
            far.close()
        self._socket = near
        path = self._log_folder / f"fork-server-{self._servers_started:04d}.log"
        self._servers_started += 1
        # Without a word from the server there is no such file.
        self._logs.begin(self._log, path)
        asyncio.get_running_loop().add_reader(near, self._receive, near)
        return near

    def _receive(self, near: socket.socket) -> None:
        try:
            message = near.recv(REQUEST_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._end_server()
            return
        answered = json.loads(message)
        self._take_answer(answered["number"])(answered["pid"], answered["code"], b"")

    def _end_server(self) -> None:
        process, near = self._process, self._socket
        if process is None or near is None:
            return
        asyncio.get_running_loop().remove_reader(near)
        near.close()
        self._process = self._socket = None
        process.kill()  # it has closed its socket, or is not wanted any more
        code = process.wait()
        self._logs.end(self._log)
        log.info("the fork server has ended (%d)", code)
        words = self._log.read(0, self._log.size)
        for number in list(self._answers):
            # Whatever it came to: none was started, and an exit code of 0 would not say so.
            self._take_answer(number)(0, code or 1, words)

    def _take_answer(self, number: int) -> Answer:
        answer = self._answers.pop(number)
        if not self._answers:
            adopt_orphans(False)
        return answer
