"""Rank processes forked from one that has imported torch: 0.2 s each instead of 3.

Most of what a test with real ranks costs is the import of torch, once a rank. So each test session
keeps one *server*, a process that imports what ranks import, single-threaded, and then does nothing
but fork. A forked rank is a process of its own in every other way: its own session, environment,
pipes and exit code, and it runs its script or module as `__main__`. So is an `opt-train` that
computes (`tests/command.py`). Fresh interpreters are started where the start itself is tested: by
agents, by torchrun, by the installed command.

A server may import more than that, for ranks whose own imports take long: DeepSpeed, a compiler.

What makes it safe: the server has one thread and never runs an operation on several (a forked child
would wait for ever for OpenMP's pool, which did not survive the fork).
"""

import array
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
FDS_MAX = 16
SPARE_FD = 256
"""Descriptors are moved above this first, so that none is written over before its turn."""


class Forked:
    """A process that a server forked: what tests use of `subprocess.Popen`."""

    def __init__(self, server: "Server", pid: int) -> None:
        self._server = server
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self._server.codes.get(self.pid)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        self._server.receive(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + (3600.0 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 3600.0)
            self._server.receive(0.05)
        return code

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Server:
    """The near end: asks for forks and learns of exits."""

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._socket, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.codes: dict[int, int] = {}
        self._pids: list[int] = []
        packages = os.pathsep.join((str(ROOT), str(ROOT / "logbook")))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": packages}
        # Its output is nobody's: a reader of the test session's must not wait for it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.forked", str(far.fileno()), *imports],
            pass_fds=(far.fileno(),),
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        far.close()

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any],
        stdin: IO[Any] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Forked:
        """Fork a process that runs `command`: a script's path or ``-m MODULE``, and arguments.
        Without `stdin` it has nothing to read."""
        streams = {1: stdout, 2: stderr} | ({0: stdin} if stdin else {})
        request = {
            "command": list(command),
            "env": dict(env),
            "cwd": str(cwd or os.getcwd()),
            "fds": [*streams, *pass_fds],
        }
        fds = array.array("i", [*(stream.fileno() for stream in streams.values()), *pass_fds])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        self._socket.sendmsg([json.dumps(request).encode()], rights)
        while not self._pids:
            self.receive(1.0)
        return Forked(self, self._pids.pop())

    def receive(self, seconds: float) -> None:
        """Take in what the server reports; waits for at most one message."""
        while select.select([self._socket], [], [], seconds)[0]:
            message = self._socket.recv(1 << 16)
            assert message, f"the fork server is gone: {self._process.poll()}"
            report = json.loads(message)
            if "code" in report:
                self.codes[report["pid"]] = report["code"]
            else:
                # A number may come again: what ended under it before was another process.
                self.codes.pop(report["pid"], None)
                self._pids.append(report["pid"])
            seconds = 0.0


@functools.cache
def server(*imports: str) -> Server:
    """The one of this test session that has also imported `imports`; it ends with the session,
    because its socket does."""
    return Server(imports)


# The far end --------------------------------------------------------------------------------------


def serve(near: socket.socket, imports: Sequence[str]) -> list[str]:
    """Fork on request and report exits, until the other end is gone. Returns in a child, with the
    command that it is to be."""
    import_what_ranks_import()
    for name in imports:
        importlib.import_module(name)
    gc.freeze()  # else the first collection in each child copies every page
    wakeup, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([near, wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 1 << 12)
            report_exits(near)
        if near in ready:
            message, rights, _, _ = socket.recv_fds(near, 1 << 20, FDS_MAX)
            if not message:
                os._exit(0)
            request = json.loads(message)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                near.close()
                for fd in (wakeup, wakeup_write):
                    os.close(fd)
                become(request, rights)
                return list(request["command"])
            for fd in rights:
                os.close(fd)
            near.send(json.dumps({"pid": pid}).encode())


def report_exits(near: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            near.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def become(request: Mapping[str, Any], rights: Sequence[int]) -> None:
    """Session, directory, environment and descriptors as they were asked for."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    moved = []
    for fd in rights:
        moved.append(os.dup2(fd, SPARE_FD + len(moved)))
        os.close(fd)
    for fd, target in zip(moved, request["fds"], strict=True):
        os.dup2(fd, target, inheritable=True)
        os.close(fd)


def import_what_ranks_import() -> None:
    """And what `opt-train train` needs beside that."""
    from opt_train.train import warm

    warm.import_everything()
    import hydra  # noqa: F401
    import opt_logbook.render.render  # noqa: F401

    import opt_train.cli.train
    import opt_train.train.rank  # noqa: F401

    # They are run as `__main__`, and Python would warn that they are here already.
    for name in ("opt_train.train.warm", "opt_train.cli.main"):
        sys.modules.pop(name, None)


def be(command: Sequence[str]) -> None:
    """Run a script or module as the interpreter would."""
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    command = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    code = 1
    try:
        be(command)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
