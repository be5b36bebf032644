"""A cluster that Slurm owns. The supervisor holds the nodes from outside: it sits on none of them.

Theory of operation
===================

The allocation is made by ``salloc --no-shell --no-kill`` and belongs to no process: it survives the
loss of any of its nodes, the first included, and of the supervisor. Its job name says whose it is
(`allocation_name`), so that a supervisor that comes back finds it before it asks for another one.

On every node one step runs, the agent. Each is started by an srun of its own, with ``--overlap``: a
step on a dead node that Slurm has not given up yet does not hold up the others. srun is nothing but
the starter: as soon as the agent has registered, its srun is killed by SIGKILL. The step runs on,
and nothing of the supervisor's job reaches the agents any more, not even its requeue, which sends
TERM to every process (a TERM would have srun end its step).

What the agents need (where to dial, the secret, the configuration) lies in the run directory, which
all nodes share. Their link to the supervisor is TCP, and srun's own stdio carries nothing.

The controller is watched every `POLL_SECONDS`, by three questions for all nodes at once, however
often `observe` is called.
"""

import contextlib
import hashlib
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.cluster import NodeState, NodeStatus
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.registration import read_registration
from opt_train.config.run_config import RunConfig
from opt_train.host import signals
from opt_train.host.processes import NODE_MARK, mark_of
from opt_train.link.endpoint import TcpEndpoint
from opt_train.protocol.exits import BadInput

AGENT_STEP = "opt-train-agent"
POLL_SECONDS = 2.0
ALLOCATE_POLL_SECONDS = 1.0
START_SECONDS = 30.0
"""From srun to a step that Slurm shows; until then a node without one is unknown."""
FENCE_SECONDS = 10.0
"""For a killed step to be gone: longer than this, and its node does not answer."""
_DOWN = ("down", "error", "powered_down", "powering_down", "reboot_issued")
_WANTED_BACK = ("drain", "fail")
"""``draining``, ``failing``: the node works, and an admin has said that it shall not go on."""
_AWAY = ("Unable to contact slurm controller", "timed out", "Connection refused")
"""What salloc says when the controller does not answer, which is no refusal."""

log = logging.getLogger(__name__)


def allocation_name(run: RunDirectory) -> str:
    """The name of a run's allocation: the run's, and what no other run directory shares."""
    path = run.path.resolve()
    return f"opt-train-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


class AgentStep(StrEnum):
    """What is known of the step of a node's agent; the value is the reason that a person reads."""

    RUNS = "its agent runs"
    NEVER_STARTED = "no agent has been started"
    STARTING = "its agent is being started"
    ENDED = "its agent's step has ended"


class SlurmCluster:
    """The nodes of one allocation, in Slurm's order."""

    def __init__(self, run: RunDirectory, config: ClusterConfig) -> None:
        self._run, self._config = run, config
        self._name = allocation_name(run)
        self._job = ""
        self._names: tuple[str, ...] = ()
        self._starters: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}
        self._seen: dict[str, NodeStatus] = {}
        self._seen_at = float("-inf")
        self._seconds_left: float | None = None

    @property
    def node_names(self) -> tuple[str, ...]:
        return self._names

    def check_before_start(self, config: RunConfig) -> None:
        """Refuse where there is no Slurm, or one that does not answer.

        Raises:
            BadInput: what is missing.
        """
        absent = slurm.missing_programs()
        if absent:
            raise BadInput(
                f"cluster=slurm needs {', '.join(absent)} on the PATH; start this where Slurm's "
                "commands are, or use cluster=local"
            )
        try:
            slurm.all_nodes()
        except slurm.SlurmError as error:
            raise BadInput(f"Slurm does not answer ({error}); try again when it does") from None

    # The allocation -------------------------------------------------------------------------------

    def acquire(
        self, failed: Collection[str], announce: Callable[[str], None], stopped: Callable[[], bool]
    ) -> bool:
        """Adopt this run's allocation, or ask for one without the nodes in `failed` and wait."""
        wanted = str(self._config.nodes)
        if self._config.buffer_nodes:
            # With fewer buffer nodes a run begins; for want of them it waits for nobody.
            wanted += f"-{self._config.nodes + self._config.buffer_nodes}"
        asking: subprocess.Popen[str] | None = None
        said = ""
        try:
            while not stopped():
                with contextlib.suppress(slurm.SlurmError):
                    found = slurm.find_allocation(self._name)
                    if found is not None and found.state == "RUNNING" and found.nodes:
                        self._job, self._names = found.job, slurm.hostnames(found.nodes)
                        if asking is not None:
                            self._check_time()
                        announce(f"nodes {found.nodes} of Slurm job {found.job}")
                        return True
                    if found is None and asking is None:
                        asking = self._ask_for(wanted, failed)
                    state = "asked for" if found is None else f"{found.state} ({found.reason})"
                    if found is not None and state != said:
                        said = state
                        announce(f"waiting for {wanted} nodes: Slurm job {found.job} is {state}")
                if asking is not None and asking.poll() not in (None, 0):
                    assert asking.stderr is not None
                    why = " ".join(asking.stderr.read().split())
                    if not any(sign in why for sign in _AWAY):
                        raise BadInput(
                            f"Slurm gives no nodes: {why}; change cluster.nodes or cluster.slurm.*"
                        )
                    asking = None  # asked again
                time.sleep(ALLOCATE_POLL_SECONDS)
            self._withdraw()
            return False
        finally:
            if asking is not None and asking.poll() is None:
                asking.terminate()

    def _check_time(self) -> None:
        """Refuse new nodes whose time would be over before a run could begin on them."""
        _, left = slurm.state_of(self._job)
        needed = self._config.slurm.stop_before_seconds
        if left is not None and left < needed:
            self.release()
            raise BadInput(
                f"Slurm gives nodes for {left:g} s only, and cluster.slurm.stop_before_seconds="
                f"{needed:g}; raise cluster.slurm.time_limit or lower that"
            )

    def _ask_for(self, nodes: str, failed: Collection[str]) -> subprocess.Popen[str]:
        command = ["salloc", "--no-shell", "--no-kill", *self.allocation_options(nodes)]
        # Another cluster's names, as of a run that began elsewhere, would be refused.
        excluded = sorted(slurm.all_nodes() & set(failed))
        if excluded:
            command.append(f"--exclude={','.join(excluded)}")
        log.info("%s", shlex.join(command))
        with signals.blocked():
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                env=slurm.clean_environment(),
            )

    def allocation_options(self, nodes: str) -> list[str]:
        """What `salloc` is asked for, as the keys of `cluster.slurm` say. `nodes`: ``2-4`` are at
        least two and at most four."""
        c = self._config.slurm
        # Without a number of tasks: with one, Slurm gives as few nodes as have room for it.
        options = [
            f"--job-name={self._name}",
            f"--nodes={nodes}",
            "--exclusive",
            "--mem=0",
            f"--comment=opt_train {self._run.path}",
        ]
        for name in ("account", "partition", "qos", "reservation", "constraint"):
            if value := getattr(c, name):
                options.append(f"--{name}={value}")
        if c.time_limit:
            options.append(f"--time={c.time_limit}")
        if c.gpu_option:
            options.append(c.gpu_option.replace("{slots}", str(self._config.slots_per_node)))
        return [*options, *shlex.split(c.options)]

    def _withdraw(self) -> None:
        """Take back what is still pending."""
        with contextlib.suppress(slurm.SlurmError):
            found = slurm.find_allocation(self._name)
            if found is not None and found.state != "RUNNING":
                slurm.ask("scancel", found.job)

    @property
    def outlives_supervisor(self) -> bool:
        """Whether this process is in a Slurm job of its own."""
        return os.environ.get("SLURM_JOB_ID", self._job) != self._job

    @property
    def ends_soon(self) -> bool:
        left = self._seconds_left
        return left is not None and left < self._config.slurm.stop_before_seconds

    def release(self) -> None:
        """Give the allocation back; with it ends what still runs in it."""
        job = self._job
        if not job:
            try:
                found = slurm.find_allocation(self._name)
            except slurm.SlurmError as error:
                log.error("no allocation was looked for: %s", error)
                return
            if found is None:
                return
            job = found.job
        try:
            slurm.ask("scancel", job)
        except slurm.SlurmError as error:
            log.error("job %s was not given back: %s; try: scancel %s", job, error, job)

    # Agents ---------------------------------------------------------------------------------------

    def make_endpoint(self) -> TcpEndpoint:
        """The one address of this host from which the nodes are reached."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel only says by which of its addresses it would be.
            probe.connect((self._names[0], 9))
            return TcpEndpoint(probe.getsockname()[0], 0)

    def start_agent(self, node: str) -> None:
        """Start the agent, unless a step of it lives on the node."""
        lives = slurm.steps_of(self._job, AGENT_STEP).get(node) and read_registration(
            self._run, node
        )
        if lives or self._is_starting(node):
            return
        folder = self._run.nodes / node
        self._run.make_folder(folder)
        (folder / "agent.json").unlink(missing_ok=True)
        agent = [sys.executable, "-P", "-m", "opt_train.agent", "--run", str(self._run.path)]
        agent += ["--node", node, "--slots", str(self._config.slots_per_node)]
        give_back = [sys.executable, "-P", "-m", "opt_train.clusters.slurm_give_back"]
        give_back += [str(self._run.path), self._job]
        agent += ["--give-back", shlex.join(give_back)]
        with signals.blocked():
            self._starters[node] = subprocess.Popen(
                [*self._srun(node, AGENT_STEP), *_logged_to(folder / "agent.log"), *agent],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=slurm.clean_environment() | {NODE_MARK: mark_of(self._run.path, node)},
            )
        self._started[node] = time.monotonic()
        self._seen_at = float("-inf")
        log.info("%s: agent asked for, by srun process %d", node, self._starters[node].pid)

    def _srun(self, node: str, name: str) -> list[str]:
        return [
            *("srun", f"--jobid={self._job}", f"--job-name={name}", f"--nodelist={node}"),
            *("--nodes=1", "--ntasks=1", "--overlap", "--no-kill", "--mem=0", "--cpu-bind=none"),
            *("--input=none", "--output=none", "--error=none"),
        ]

    def _is_starting(self, node: str) -> bool:
        starter = self._starters.get(node)
        return starter is not None and starter.poll() is None

    def _let_go_of_starters(self) -> None:
        """Kill the srun of each agent that has registered."""
        for node, starter in list(self._starters.items()):
            if starter.poll() is None and read_registration(self._run, node) is None:
                continue
            # SIGTERM would end the step.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starter.pid, signal.SIGKILL)
            starter.wait()
            del self._starters[node]

    def fence(self, node: str) -> bool:
        """Kill the node's step, and wait until Slurm has seen it end.

        A node that is cut off goes on: what it writes is fenced by its generation, and its agent
        ends the ranks when nobody has led it for `supervisor.orphan_seconds`.
        """
        starter = self._starters.pop(node, None)
        if starter is not None and starter.poll() is None:
            starter.terminate()  # it may not have started anything yet
        deadline = time.monotonic() + FENCE_SECONDS
        try:
            for step in slurm.steps_of(self._job, AGENT_STEP).get(node, ()):
                slurm.ask("scancel", "--signal=KILL", step)
            while slurm.steps_of(self._job, AGENT_STEP).get(node):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.2)
        except slurm.SlurmError as error:
            log.warning("%s was not fenced: %s", node, error)
            return False
        finally:
            self._seen_at = float("-inf")
        return True

    # What is known --------------------------------------------------------------------------------

    def observe(self) -> dict[str, NodeStatus]:
        if time.monotonic() - self._seen_at >= POLL_SECONDS:
            self._let_go_of_starters()
            self._seen = self._ask_for_states()
            self._seen_at = time.monotonic()
        return self._seen

    def _ask_for_states(self) -> dict[str, NodeStatus]:
        try:
            job, self._seconds_left = slurm.state_of(self._job)
            if job != "RUNNING":
                ended = f"Slurm job {self._job} is {job or 'gone'}"
                state = NodeState.UNKNOWN if job == "SUSPENDED" else NodeState.DOWN
                return {node: NodeStatus(state, ended) for node in self._names}
            states = slurm.node_states(self._names)
            steps = slurm.steps_of(self._job, AGENT_STEP)
        except slurm.SlurmError as error:
            # The controller is away: that says nothing of the nodes (invariant 11).
            return {node: NodeStatus(NodeState.UNKNOWN, str(error)) for node in self._names}
        return {
            node: status_of(*states.get(node, ("", "")), self._agent_of(node, steps))
            for node in self._names
        }

    def _agent_of(self, node: str, steps: Mapping[str, object]) -> AgentStep:
        if steps.get(node):
            return AgentStep.RUNS
        started = self._started.get(node)
        if started is None:
            return AgentStep.NEVER_STARTED
        starting = time.monotonic() - started < START_SECONDS and self._is_starting(node)
        return AgentStep.STARTING if starting else AgentStep.ENDED

    def living_agents(self) -> tuple[str, ...]:
        found = slurm.find_allocation(self._name)
        return tuple(sorted(slurm.steps_of(found.job, AGENT_STEP))) if found is not None else ()

    def agent_pid(self, node: str) -> int | None:
        """The registered agent's pid in the process table of its node, if its step lives."""
        registered = read_registration(self._run, node)
        alive = self._seen.get(node, NodeStatus(NodeState.UNKNOWN)).state == NodeState.UP
        return registered.pid if registered is not None and alive else None

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        """Send a signal to a process of the node; False if `pid` is none of its processes (any
        more)."""
        mark = f"{NODE_MARK}={mark_of(self._run.path, node)}"
        script = 'tr "\\0" "\\n" <"/proc/$1/environ" | grep -Fqx -- "$0" && kill "-$2" "$1"'
        try:
            slurm.ask(
                *self._srun(node, "opt-train-signal"),
                "sh",
                "-c",
                script,
                mark,
                str(pid),
                str(number),
            )
        except slurm.SlurmError:
            return False
        return True


def status_of(state: str, reason: str, agent: AgentStep) -> NodeStatus:
    """A node by what ``sinfo`` says of it (``mixed``, ``down*``; empty: nothing) and by its agent's
    step."""
    if state.startswith(_DOWN):
        return NodeStatus(NodeState.DOWN, f"Slurm: {state}{f' ({reason})' if reason else ''}")
    if state.endswith("*") or state.startswith("unknown"):
        return NodeStatus(NodeState.UNKNOWN, "the node does not answer Slurm")
    if agent is AgentStep.RUNS:
        wanted_back = state.startswith(_WANTED_BACK)
        return NodeStatus(NodeState.UP, draining=reason or "no reason given" if wanted_back else "")
    # Nothing was ever seen there: no sign of death (invariant 11).
    state_now = NodeState.DOWN if agent is AgentStep.ENDED else NodeState.UNKNOWN
    return NodeStatus(state_now, agent.value)


def _logged_to(path: Path) -> list[str]:
    """What makes the command behind it write its output to `path`, on the node itself."""
    return ["sh", "-c", 'exec >>"$0" 2>&1 </dev/null && exec "$@"', str(path)]
