"""A cluster that Slurm owns: what runs on its nodes, and what is known of them.

Theory of operation
===================

Who holds the nodes is told in `slurm_allocation.py`. On every node one step runs, the agent. Each
is started by an srun of its own, with ``--overlap``: a step on a dead node that Slurm has not given
up yet does not hold up the others. srun is nothing but the starter: as soon as the agent has
registered, its srun is killed by SIGKILL. The step runs on, and nothing of the supervisor's job
reaches the agents any more, not even its requeue, which sends TERM to every process (a TERM would
have srun end its step).

What the agents need (where to dial, the secret, the configuration) lies in the run directory, which
all nodes share. Their link to the supervisor is TCP, and srun's own stdio carries nothing.

The controller is watched every `POLL_SECONDS`, by three questions for all nodes at once, however
often `observe` is called.
"""

import contextlib
import logging
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.cluster import NodeState, NodeStatus
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.containers import (
    Container,
    check_container,
    make_container,
    mounted_paths,
)
from opt_train.clusters.registration import read_registration
from opt_train.clusters.slurm_allocation import AGENT_STEP, SlurmAllocation
from opt_train.clusters.slurm_topology import ask_topology
from opt_train.clusters.topology import Topology
from opt_train.config.run_config import RunConfig, from_json
from opt_train.host import signals
from opt_train.host.children import ProgramEnd, run_within
from opt_train.host.processes import NODE_MARK, mark_of
from opt_train.link.endpoint import TcpEndpoint
from opt_train.protocol.exits import BadInput
from opt_train.run.code.frozen_code import code_environment

KEEPER_STEP = "opt-train-give-back"
"""Beside an agent in a container, which has none of Slurm's commands."""
ORPHANED = "orphaned"
"""The file by which such an agent asks that the allocation be given back."""
POLL_SECONDS = 2.0
START_SECONDS = 30.0
"""From srun to a step that Slurm shows; until then a node without one is unknown."""
FENCE_SECONDS = 10.0
"""For a killed step to be gone: longer than this, and its node does not answer."""
_DOWN = ("down", "error", "powered_down", "powering_down", "reboot_issued")
_WANTED_BACK = ("drain", "fail")
"""``draining``, ``failing``: the node works, and an admin has said that it shall not go on."""

log = logging.getLogger(__name__)


class AgentStep(StrEnum):
    """What is known of the step of a node's agent; the value is the reason that a person reads."""

    RUNS = "its agent runs"
    NEVER_STARTED = "no agent has been started"
    STARTING = "its agent is being started"
    ENDED = "its agent's step has ended"


class SlurmCluster:
    """The nodes of one allocation, in Slurm's order."""

    def __init__(self, run: RunDirectory, config: ClusterConfig, code: Path | None = None) -> None:
        self._run, self._config, self._code = run, config, code
        self._allocation = SlurmAllocation(run, config)
        self._names: tuple[str, ...] = ()
        self._topology = Topology()
        self._starters: dict[str, subprocess.Popen[bytes]] = {}
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}
        self._seen: dict[str, NodeStatus] = {}
        self._seen_at = float("-inf")

    @property
    def node_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def topology(self) -> Topology:
        return self._topology

    def check_before_start(self, config: RunConfig) -> None:
        """Refuse where there is no Slurm, or one that does not answer.

        Raises:
            BadInput: what is missing.
        """
        check_container(self._config.slurm, mounted_paths(self._run.path, config))
        absent = slurm.missing_programs(self._config.slurm.holder)
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
        self,
        failed: Collection[str],
        announce: Callable[[str], None],
        stopped: Callable[[], bool],
        avoided: Sequence[str] = (),
    ) -> bool:
        """Have the nodes, as `cluster.slurm.holder` says."""
        had = self._allocation.acquire(failed, announce, stopped, avoided)
        if had:
            self._topology = ask_topology()
        # Each allocation by itself: what was added later takes nobody's place in the order.
        ordered = map(self._topology.ordered, self._allocation.nodes_of.values())
        self._names = tuple(node for nodes in ordered for node in nodes)
        return had

    def request(self, count: int, failed: Collection[str]) -> None:
        self._allocation.request(count, failed)

    @property
    def outlives_supervisor(self) -> bool:
        return self._allocation.outlives_supervisor

    @property
    def ends_soon(self) -> bool:
        left = self._allocation.seconds_left
        return left is not None and left < self._config.slurm.stop_before_seconds

    def release(self) -> None:
        self._allocation.release()

    # Agents ---------------------------------------------------------------------------------------

    def make_endpoint(self) -> TcpEndpoint:
        """The one address of this host from which the nodes are reached."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel only says by which of its addresses it would be.
            probe.connect((self._names[0], 9))
            return TcpEndpoint(probe.getsockname()[0], 0)

    def start_agent(self, node: str) -> None:
        """Start the agent, unless a step of it lives on the node."""
        lives = self._agent_steps().get(node) and read_registration(self._run, node)
        if lives or self._is_starting(node):
            return
        folder = self._run.nodes / node
        self._run.make_folder(folder)
        (folder / "agent.json").unlink(missing_ok=True)
        give_back = [sys.executable, "-P", "-m", "opt_train.clusters.slurm_give_back"]
        give_back += [str(self._run.path)]
        variables = {
            **code_environment(self._code),
            NODE_MARK: mark_of(self._run.path, node),
        }
        container = self._container(variables)
        if container.hides_slurm:
            # In front of the agent: it removes the file by which an earlier one asked.
            self._start_keeper(node, folder / ORPHANED, give_back)
            give_back = ["touch", str(folder / ORPHANED)]
        agent = [container.python, "-P", "-m", "opt_train.agent", "--run", str(self._run.path)]
        agent += ["--node", node, "--slots", str(self._config.slots_per_node)]
        agent += ["--give-back", shlex.join(give_back)]
        step = [*self._srun(node, AGENT_STEP), *container.srun_options]
        step += [*_logged_to(folder / "agent.log"), *container.prefix, *agent]
        self._starters[node] = _start(step, {**variables, **container.environment})
        self._started[node] = time.monotonic()
        self._seen_at = float("-inf")
        log.info("%s: agent asked for, by srun process %d", node, self._starters[node].pid)

    def _container(self, variables: Mapping[str, str]) -> Container:
        """The container of a step of the run, in which `variables` are seen."""
        if not self._config.slurm.container:
            return Container()
        paths = mounted_paths(self._run.path, from_json(self._run.config_json))
        # Of a preflight the data may not have been prepared yet.
        paths = [path for path in paths if path.exists()]
        return make_container(self._config.slurm, paths, variables)

    def _start_keeper(self, node: str, orphaned: Path, give_back: list[str]) -> None:
        """Start the step that gives the allocation back for an agent in a container, once the file
        `orphaned` is there; unless it lives."""
        if self._steps(KEEPER_STEP).get(node) or node in self._keepers:
            return
        orphaned.unlink(missing_ok=True)
        # A shell that sleeps, for it waits beside every agent: Python would take more memory.
        wait = ["sh", "-c", 'until [ -e "$0" ]; do sleep 5; done; exec "$@"', str(orphaned)]
        command = [*self._srun(node, KEEPER_STEP), *wait, *give_back]
        self._keepers[node] = _start(command, code_environment(self._code))

    def _srun(self, node: str, name: str, output: str = "none") -> list[str]:
        job = self._allocation.job_of(node)
        return [
            *("srun", f"--jobid={job}", f"--job-name={name}", f"--nodelist={node}"),
            *("--nodes=1", "--ntasks=1", "--overlap", "--no-kill", "--mem=0", "--cpu-bind=none"),
            *("--input=none", f"--output={output}", f"--error={output}"),
        ]

    def _steps(self, name: str) -> dict[str, list[str]]:
        return slurm.steps_of(self._allocation.nodes_of, name)

    def _agent_steps(self) -> dict[str, list[str]]:
        """The agents' steps by node; without those of an allocation that the node has failed in and
        has come back from in another: of a node that lost power Slurm shows them on and on."""
        allocation = self._allocation
        found = {
            node: [step for step in steps if step.partition(".")[0] == allocation.job_of(node)]
            for node, steps in self._steps(AGENT_STEP).items()
        }
        return {node: steps for node, steps in found.items() if steps}

    def _is_starting(self, node: str) -> bool:
        starter = self._starters.get(node)
        return starter is not None and starter.poll() is None

    def _let_go_of_starters(self) -> None:
        """Kill the srun of each agent that has registered."""
        for node, starter in list(self._starters.items()):
            if starter.poll() is None and read_registration(self._run, node) is None:
                continue
            _let_go(starter)
            del self._starters[node]
        if self._keepers:
            kept = self._steps(KEEPER_STEP)
            for node, starter in list(self._keepers.items()):
                if kept.get(node) or starter.poll() is not None:
                    _let_go(starter)
                    del self._keepers[node]

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
            if not self._allocation.find():
                return False
            for step in self._steps(AGENT_STEP).get(node, ()):
                slurm.ask("scancel", "--signal=KILL", step)
            while self._steps(AGENT_STEP).get(node):
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
            jobs = self._allocation.refresh()
            states = slurm.node_states(self._allocation.nodes)
            steps = self._agent_steps()
            seen: dict[str, NodeStatus] = {}
            for number, nodes in self._allocation.nodes_of.items():
                ended = _ended(number, jobs.get(number))
                for node in nodes:
                    agent = self._agent_of(node, steps)
                    seen[node] = ended or status_of(*states.get(node, ("", "")), agent)
        except slurm.SlurmError as error:
            # The controller is away: that says nothing of the nodes (invariant 11).
            away = NodeStatus(NodeState.UNKNOWN, str(error))
            return dict.fromkeys(self._allocation.nodes, away)
        return seen

    def _agent_of(self, node: str, steps: Mapping[str, object]) -> AgentStep:
        if steps.get(node):
            return AgentStep.RUNS
        started = self._started.get(node)
        if started is None:
            return AgentStep.NEVER_STARTED
        starting = time.monotonic() - started < START_SECONDS and self._is_starting(node)
        return AgentStep.STARTING if starting else AgentStep.ENDED

    def living_agents(self) -> tuple[str, ...]:
        jobs = [job.job for job in self._allocation.living_jobs()]
        return tuple(sorted(slurm.steps_of(jobs, AGENT_STEP))) if jobs else ()

    def run_on(self, node: str, command: Sequence[str], seconds: float) -> ProgramEnd:
        """Run the program as a step of the node.

        Its output comes by srun's stdio: one task, which nobody tears, and one reader, which reads.
        """
        variables = {**code_environment(self._code), NODE_MARK: mark_of(self._run.path, node)}
        container = self._container(variables)
        words = [container.python if word == sys.executable else word for word in command]
        inside = [*container.srun_options, *container.prefix, *words]
        return self._run_step(node, inside, seconds, {**variables, **container.environment})

    def _run_step(
        self, node: str, words: Sequence[str], seconds: float, variables: Mapping[str, str]
    ) -> ProgramEnd:
        """What came of a step; `words` are further options of srun's and the command."""
        # A name of its own: what is left of it is killed, and nothing else is.
        name = f"opt-train-{secrets.token_hex(4)}"
        step = [*self._srun(node, name, output="all"), *words]
        end = run_within(seconds, step, {**slurm.clean_environment(), **variables})
        if end.code is None:
            # srun was killed, and its step runs on.
            with contextlib.suppress(slurm.SlurmError):
                for left in self._steps(name).get(node, ()):
                    slurm.ask("scancel", "--signal=KILL", left)
        # srun adds its own words to the program's, which say more.
        own = [line for line in end.errors.splitlines() if not line.startswith("srun: ")]
        return replace(end, errors="\n".join(own)) if own else end

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
        command = ["sh", "-c", script, mark, str(pid), str(number)]
        # Beside a container, not in it: there the pid is another's.
        return self._run_step(node, command, slurm.ANSWER_SECONDS, {}).code == 0


def _ended(number: str, job: slurm.SlurmJob | None) -> NodeStatus | None:
    """What the end of an allocation makes of its nodes; None: it runs."""
    if job is not None and job.state == "SUSPENDED":
        return NodeStatus(NodeState.UNKNOWN, f"Slurm job {number} is SUSPENDED")
    if job is not None and job.state == "RUNNING":
        return None
    state = job.state if job is not None else slurm.state_of(number)
    return NodeStatus(NodeState.DOWN, f"Slurm job {number} is {state or 'gone'}", taken_back=True)


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


def _start(command: list[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start an srun, deaf to what ends the supervisor; its step sees `variables`."""
    with signals.blocked():
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**slurm.clean_environment(), **variables},
        )


def _let_go(starter: subprocess.Popen[bytes]) -> None:
    """Kill an srun whose step runs; the step runs on. SIGTERM would end it too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()


def _logged_to(path: Path) -> list[str]:
    """What makes the command behind it write its output to `path`, on the node itself."""
    return ["sh", "-c", 'exec >>"$0" 2>&1 </dev/null && exec "$@"', str(path)]
