"""``python -m opt_train.agent.fork_server MODULE --socket-fd N``: fork the ranks of a node.

It imports MODULE and all that a rank imports, once a node, and forks a rank whenever the agent asks
for one (`RankStarter`): that takes 20 ms where imports take 1 to 10 s of a core, for each of the
node's ranks and again after every failure. It does nothing else, ever.

- A rank is forked twice, so that it is the child of the agent, which adopts orphans meanwhile: the
  agent learns from the kernel how it ended, and the end of this process ends no rank.
- A child has one thread. Forked after an operation on several, it would wait for ever for OpenMP's
  pool, which the fork lost; and CUDA does not work in a child of a process that has opened a GPU.
  So nothing is computed here. Where there is another thread or an open GPU all the same, the child
  becomes a new interpreter (exec) that imports for itself: slower, and right.
"""

import argparse
import gc
import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Never

from opt_train.agent.core_binding import bind, parse_cores
from opt_train.host.processes import die_with_parent

REQUEST_BYTES_MAX = 4096
_DESCRIPTORS = 3
"""Of a request: the rank's log, the pipe for its facts, the pipe of its orders."""


def main(arguments: Sequence[str]) -> Never:
    """Serve until the agent is gone."""
    try:
        serve(arguments)
    except BaseException:
        traceback.print_exc()
        # With the socket open: whoever sees it closed kills this process, and that is another end.
        os._exit(1)


def serve(arguments: Sequence[str]) -> Never:
    """See `main`."""
    parser = argparse.ArgumentParser(description="Started by an agent, not by people.")
    parser.add_argument("module")
    parser.add_argument("--socket-fd", type=int, required=True)
    given = parser.parse_args(arguments)
    agent = socket.socket(fileno=given.socket_fd)
    module = importlib.import_module(given.module)
    if hasattr(module, "import_everything"):
        module.import_everything()
    # Now, for all ranks to come: nothing runs here afterwards that could change it.
    unfit = why_not_to_fork(module)
    gc.freeze()  # else the first collection in each child copies every page
    while True:
        request, descriptors, _, _ = socket.recv_fds(agent, REQUEST_BYTES_MAX, _DESCRIPTORS)
        # The kernel ends this process with the agent; a closed socket says that it is not wanted.
        if not request:
            os._exit(0)
        answer(agent, json.loads(request), descriptors, module, unfit)


def answer(
    agent: socket.socket,
    request: Mapping[str, Any],
    descriptors: Sequence[int],
    module: ModuleType,
    unfit: str,
) -> None:
    """Start a rank and tell its pid, or the exit code of what should have been one."""
    go, let_go = os.pipe()

    def be_the_rank() -> Never:
        # Held open here, they would hide the end of the agent, and of this process, from others.
        agent.close()
        os.close(let_go)
        # Before it has other threads: they inherit it, and cannot be told of later.
        bind(parse_cores(request["cores"]))
        become(module, descriptors, request["agent"], go, unfit)

    pid, code = fork_twice(be_the_rank)
    for descriptor in (*descriptors, go):
        os.close(descriptor)
    agent.send(json.dumps({"number": request["number"], "pid": pid, "code": code}).encode())
    # It is the agent's child by now, who knows it. Had this process ended before, it would too.
    os.write(let_go, b"\n")
    os.close(let_go)


def why_not_to_fork(module: ModuleType) -> str:
    """Why a child of this process would be no fit rank; empty: it would."""
    if not hasattr(module, "main"):
        return f"{module.__name__} has no function main"
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"its imports have started {threads - 1} threads"
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            opened = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue  # the one of the listing itself
        if opened.startswith("/dev/nvidia"):
            return f"its imports have opened {opened}"
    return ""


def fork_twice(child: Callable[[], Never]) -> tuple[int, int]:
    """The pid of a process that is no child of this one and runs `child`, and 0; if that cannot be
    had, 0 and an exit code."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            os.close(read)
            pid = os.fork()
            if pid == 0:
                os.close(write)
                child()
            # It leads a group from the first moment that anyone may kill that.
            os.setpgid(pid, pid)
            os.write(write, str(pid).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    # Empty if the process in between could not fork, and said so in the log.
    written = os.read(read, 32)
    os.close(read)
    _, status = os.waitpid(between, 0)
    return (int(written), 0) if written else (0, os.waitstatus_to_exitcode(status))


def become(
    module: ModuleType, descriptors: Sequence[int], agent: int, go: int, unfit: str
) -> Never:
    """Be a rank of `agent` with these `descriptors`, once `go` can be read."""
    code = 1
    try:
        log, facts, control = descriptors
        # From here on what goes wrong stands in the rank's own log.
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        if not os.read(go, 1):
            os._exit(1)
        os.close(go)
        die_with_parent(agent)()
        arguments = ["--facts-fd", str(facts), "--control-fd", str(control)]
        if unfit:
            print(f"this rank imports by itself: {unfit}", file=sys.stderr, flush=True)
            # Received descriptors are closed by an exec otherwise.
            os.set_inheritable(facts, True)
            os.set_inheritable(control, True)
            command = [sys.executable, "-P", "-m", module.__name__, *arguments]
            os.execv(sys.executable, command)  # noqa: S606 - a shell has no part in it
        sys.argv = [str(module.__file__), *arguments]
        code = module.main() or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
