"""A cluster of one machine: each node is an agent process in a session of its own, that outlives
the supervisor."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import DOWN, UNKNOWN, UP, NodeView
from opt_train.host import signals
from opt_train.host.processes import (
    NODE_MARK,
    bears_mark,
    is_alive,
    kill_marked,
    mark_of,
    send_signal,
)

_MAX_FILE_BYTES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registered:
    """What an agent wrote of itself in ``nodes/<node>/agent.json``."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        return is_alive(self.pid, self.start_ticks)


class LocalCluster:
    """Nodes ``node-1`` to ``node-N``. A new supervisor finds the agents of the one before by their
    registration."""

    def __init__(self, run: RunDirectory, nodes: int, slots_per_node: int) -> None:
        """`nodes` counts those that train and those that stand by."""
        self._run = run
        self._slots = slots_per_node
        self._names = tuple(f"node-{number}" for number in range(1, nodes + 1))
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def node_names(self) -> tuple[str, ...]:
        return self._names

    def start_agent(self, node: str) -> None:
        """Start the agent, unless one lives. Should two be started at once, the node's lock lets
        one live."""
        child = self._children.get(node)
        registered = self._registered(node)
        if (registered is not None and registered.alive) or (
            child is not None and child.poll() is None
        ):
            return
        folder = self._run.nodes / node
        self._run.make_folder(folder)
        command = [sys.executable, "-P", "-m", "opt_train.agent.agent"]
        command += ["--run", str(self._run.path), "--node", node, "--slots", str(self._slots)]
        with open(folder / "agent.log", "ab") as output, signals.blocked():
            self._children[node] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, NODE_MARK: mark_of(self._run.path, node)},
            )
        log.info("%s: agent process %d started", node, self._children[node].pid)

    def fence(self, node: str) -> bool:
        """SIGKILL every process of the node: each inherited the node's mark, whoever its parent is
        by now."""
        gone = kill_marked(mark_of(self._run.path, node))
        child = self._children.get(node)
        if child is not None and gone:
            child.wait()
        return gone

    def observe(self) -> dict[str, NodeView]:
        return {node: self._observe(node) for node in self._names}

    def release(self) -> None:
        for node in self._names:
            if not self.fence(node):
                log.error("%s: processes survive SIGKILL; they hang in the kernel", node)

    def agent_pid(self, node: str) -> int | None:
        """The living agent's pid."""
        registered = self._registered(node)
        return registered.pid if registered is not None and registered.alive else None

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        """Send a signal to a process of the node; False if `pid` is none of its processes (any
        more)."""
        mark = mark_of(self._run.path, node)
        return send_signal(pid, number, lambda p: bears_mark(p, mark))

    def _observe(self, node: str) -> NodeView:
        child = self._children.get(node)
        registered = self._registered(node)
        if registered is not None and registered.alive:
            return NodeView(UP)
        if child is not None:
            code = child.poll()
            if code is None:
                return NodeView(UP)  # it has not registered yet
            return NodeView(DOWN, f"agent process {child.pid} {_ended(code)}")
        if registered is None:
            return NodeView(UNKNOWN, "no agent has been started")
        return NodeView(DOWN, f"agent process {registered.pid} is gone")

    def _registered(self, node: str) -> Registered | None:
        try:
            with open(self._run.nodes / node / "agent.json", "rb") as file:
                said = json.loads(file.read(_MAX_FILE_BYTES))
            registered = Registered(said["pid"], said["start_ticks"])
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            return None
        whole = (
            type(registered.pid) is int
            and type(registered.start_ticks) is int
            and registered.pid > 0
        )
        return registered if whole else None


def _ended(code: int) -> str:
    return f"was killed by {signals.signal_name(-code)}" if code < 0 else f"exited with code {code}"
