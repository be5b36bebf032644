"""The nodes of a run: who holds them in Slurm's name, how they are asked for, found and given back.

Theory of operation
===================

An allocation's name says whose it is (`allocation_name`), so that a supervisor that comes back
finds it before it asks for another one. `cluster.slurm.holder` says who holds it:

**outside** (``salloc --no-shell --no-kill``): nobody. It belongs to no process, and survives the
loss of any of its nodes, the first included, and of the supervisor.

**job** (``sbatch --no-kill launch/holder.sbatch``, where salloc is forbidden): a script that sleeps
on the first node. If that node dies the script is gone, and Slurm keeps the job on the others all
the same: what keeps it is its name, as above.

**inside**: the supervisor's own batch job (`launch/inside.sbatch`). It is there when the supervisor
begins, and gets the run's name. If another node dies it is replaced as ever. If the first one dies,
with the supervisor, nobody leads any more: after `supervisor.orphan_seconds` the agents have Slurm
queue the job again (`slurm_give_back`), and it begins on healthy nodes from the last checkpoint.
Other nodes for a run that has none left are a new job, queued behind this one.

While nodes are missing, others are asked for by a second allocation, whose name says that it is an
addition (`addition_name`). What it is given joins the first; the run ends with the first one, and
gives all of them back.
"""

import contextlib
import hashlib
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.config import ClusterConfig
from opt_train.host import signals
from opt_train.host.processes import dying_with_starter
from opt_train.protocol.exits import BadInput

AGENT_STEP = "opt-train-agent"
HOLDER, INSIDE, SUPERVISOR = "holder.sbatch", "inside.sbatch", "supervisor.sbatch"
ALLOCATE_POLL_SECONDS = 1.0
_AWAY = ("Unable to contact slurm controller", "timed out", "Connection refused")
"""What salloc says when the controller does not answer, which is no refusal."""

log = logging.getLogger(__name__)


def allocation_name(run: RunDirectory) -> str:
    """The name of a run's allocation: the run's, and what no other run directory shares."""
    path = run.path.resolve()
    return f"opt-train-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def addition_name(run: RunDirectory) -> str:
    """The name of allocations that add nodes to the run's own."""
    return f"{allocation_name(run)}-more"


def supervisor_name(run: RunDirectory) -> str:
    """The name of the supervisor's job, where it is not the one that holds the nodes."""
    return f"{allocation_name(run)}-supervisor"


def launch_directory() -> Path:
    """The packaged launch scripts: inside the installed package, or beside it in a checkout.

    Raises:
        BadInput: neither is there, so the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "launch", package.parent / "launch"):
        if (candidate / HOLDER).is_file():
            return candidate
    raise BadInput(
        f"{package / 'launch'} is missing from the installation; install opt-train again"
    )


def wanted_nodes(config: ClusterConfig) -> str:
    """How many nodes a run asks for, as Slurm writes it: ``2-4`` are at least two, at most four."""
    if not config.buffer_nodes:
        return str(config.nodes)
    # With fewer buffer nodes a run begins; for want of them it waits for nobody.
    return f"{config.nodes}-{config.nodes + config.buffer_nodes}"


def allocation_options(run: RunDirectory, config: ClusterConfig, name: str) -> dict[str, str]:
    """Option -> value of an allocation, as the keys of `cluster.slurm` say; without the number of
    nodes, and without `gpu_option` and `options`, which are words of the site's own."""
    # Without a number of tasks: with one, Slurm gives as few nodes as have room for it.
    options = {"job-name": name, "mem": "0", "comment": f"opt_train {run.path}"}
    for option in ("account", "partition", "qos", "reservation", "constraint"):
        if value := getattr(config.slurm, option):
            options[option] = value
    if config.slurm.time_limit:
        options["time"] = config.slurm.time_limit
    return options


def site_words(config: ClusterConfig) -> list[str]:
    """The words by which this site's nodes are asked for, beside `allocation_options`."""
    gpus = config.slurm.gpu_option.replace("{slots}", str(config.slots_per_node))
    return ["--exclusive", *([gpus] if gpus else []), *shlex.split(config.slurm.options)]


def submit_script(script: Path, *options: str) -> str:
    """Queue a script of the run, which says itself in which folder it runs; returns the job.

    Raises:
        SlurmError: Slurm refuses it, or does not answer.
    """
    return slurm.ask("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


class SlurmAllocation:
    """The nodes that a run has, in Slurm's order: those of its own job first, then additions."""

    def __init__(self, run: RunDirectory, config: ClusterConfig) -> None:
        self._run, self._config = run, config
        self._name, self._addition = allocation_name(run), addition_name(run)
        self._requested: list[str] = []
        self.avoided: Sequence[str] = ()
        """Nodes that are left out while others are to be had, the worst first."""
        self._asking: subprocess.Popen[str] | None = None
        self.job = ""
        self.nodes_of: dict[str, tuple[str, ...]] = {}
        """Job -> its nodes: the run's own allocation first, then what was added."""
        self.seconds_left: float | None = None
        """Until the time limit of the run's own allocation; None: there is none, or it is not
        known."""

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node for nodes in self.nodes_of.values() for node in nodes)

    @property
    def is_inside(self) -> bool:
        """The supervisor's own job holds the nodes."""
        return self._config.slurm.holder == "inside"

    def job_of(self, node: str) -> str:
        """The allocation that the node belongs to; the newest, where it has come back in one."""
        jobs = (job for job, nodes in reversed(self.nodes_of.items()) if node in nodes)
        return next(jobs, self.job)

    def living_jobs(self) -> list[slurm.SlurmJob]:
        """The run's allocations, additions too, whoever asked for them."""
        return slurm.living_jobs(self._name, self._addition)

    # Asking for it --------------------------------------------------------------------------------

    def acquire(
        self,
        failed: Collection[str],
        announce: Callable[[str], None],
        stopped: Callable[[], bool],
        avoided: Sequence[str] = (),
    ) -> bool:
        """Adopt this run's allocation, or ask for one without the nodes in `failed`, and of
        `avoided` without as many as can be done without, and wait; see `Cluster.acquire`."""
        self.avoided = avoided
        if self.is_inside:
            return self._acquire_inside(failed, announce, stopped)
        wanted = wanted_nodes(self._config)
        asking: subprocess.Popen[str] | None = None
        said = ""
        try:
            while not stopped():
                with contextlib.suppress(slurm.SlurmError):
                    jobs = self.living_jobs()
                    # Two of this name: somebody has asked by hand, and the newer is the wish.
                    found = next((j for j in reversed(jobs) if j.name == self._name), None)
                    if found is not None and found.has_nodes:
                        self._adopt(found, jobs)
                        if asking is not None:
                            self._check_time(found)
                        announce(f"nodes {','.join(self.nodes)} of Slurm job {found.job}")
                        return True
                    if found is None and asking is None:
                        for addition in jobs:  # to an allocation that is no more
                            slurm.ask("scancel", addition.job)
                        asking = self._ask_for(self._name, wanted, [*failed, *self.spared(failed)])
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
                asking.kill()  # what it asked for has come, or was taken back

    def spared(self, failed: Collection[str], count: int = 0) -> list[str]:
        """Those to be avoided, the worst first, without which `count` nodes that work are left
        beside `failed`; 0: as many as the run wants."""
        if not self.avoided:
            return []
        # Whoever uses them now: to be busy is no illness, and those that are down or drained Slurm
        # would not give anyhow.
        working = slurm.working_nodes(self._config.slurm.partition) - set(failed)
        wanted = count or self._config.nodes + self._config.buffer_nodes
        avoided = [node for node in self.avoided if node in working]
        spared = avoided[: max(0, len(working) - wanted)]
        if spared:
            log.info("repeat offenders are left out: %s", ", ".join(spared))
        return spared

    def _adopt(self, own: slurm.SlurmJob, jobs: Collection[slurm.SlurmJob]) -> None:
        self.job = own.job
        for job in (own, *(j for j in jobs if self._adds(j))):
            if job.has_nodes:
                self.nodes_of[job.job] = slurm.hostnames(job.nodes)

    def _check_time(self, job: slurm.SlurmJob) -> None:
        """Refuse new nodes whose time would be over before a run could begin on them."""
        left, needed = job.seconds_left, self._config.slurm.stop_before_seconds
        if left is not None and left < needed:
            self.release()
            raise BadInput(
                f"Slurm gives nodes for {left:g} s only, and cluster.slurm.stop_before_seconds="
                f"{needed:g}; raise cluster.slurm.time_limit or lower that"
            )

    def request(self, count: int, failed: Collection[str]) -> None:
        """Ask for up to `count` nodes more by an allocation of its own, unless just that is asked
        for."""
        if not self._config.slurm.ask_for_others:
            return
        wanted = [str(count), *sorted(failed)]
        pending = [j for j in slurm.living_jobs(self._addition) if not j.has_nodes]
        if wanted == self._requested and (pending or self._is_asking()):
            return
        for job in pending:
            slurm.ask("scancel", job.job)
        self._requested = wanted
        # As few as one: the run is better off with each.
        nodes = "1" if count == 1 else f"1-{count}"
        spared = self.spared([*failed, *self.nodes], count)
        self._asking = self._ask_for(self._addition, nodes, [*failed, *spared], lasting=False)

    def _is_asking(self) -> bool:
        return self._asking is not None and self._asking.poll() is None

    def _ask_for(
        self, name: str, nodes: str, failed: Collection[str], *, lasting: bool = True
    ) -> subprocess.Popen[str]:
        """`lasting`: it waits in the queue though this process ends. One that is not must end too:
        a job of Slurm's, such as the supervisor's own, has not ended before all its processes
        have."""
        command = [*self.command(name, nodes), *_excluding(failed)]
        if self._config.slurm.holder != "outside":
            self._run.submit.mkdir(parents=True, exist_ok=True)
            command.append(str(launch_directory() / HOLDER))
        log.info("%s", shlex.join(command))
        with signals.blocked() if lasting else contextlib.nullcontext():
            return subprocess.Popen(
                command if lasting else dying_with_starter(command, signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                env=slurm.clean_environment(),
            )

    def command(self, name: str, nodes: str) -> list[str]:
        """What asks Slurm for `nodes` (``2-4``: at least two, at most four), as the keys of
        `cluster.slurm` say."""
        asks = ["salloc", "--no-shell"]
        if self._config.slurm.holder != "outside":
            # Queued again it would be an allocation without the run's agents.
            asks = ["sbatch", "--no-requeue", f"--output={self._run.submit / 'holder-%j.log'}"]
        options = allocation_options(self._run, self._config, name)
        named = [f"--{option}={value}" for option, value in options.items()]
        return [*asks, "--no-kill", f"--nodes={nodes}", *named, *site_words(self._config)]

    def _adds(self, job: slurm.SlurmJob) -> bool:
        return job.name == self._addition

    def refresh(self) -> Mapping[str, slurm.SlurmJob]:
        """The run's jobs as they are now, by number; nodes that were added since are among
        `nodes_of` then."""
        jobs = {job.job: job for job in self.living_jobs()}
        for job in jobs.values():
            if job.job not in self.nodes_of and self._adds(job) and job.has_nodes:
                self.nodes_of[job.job] = slurm.hostnames(job.nodes)
                log.info("nodes %s of Slurm job %s were added", job.nodes, job.job)
        own = jobs.get(self.job)
        self.seconds_left = own.seconds_left if own is not None else None
        return jobs

    def find(self) -> bool:
        """Whether the run has nodes; found by their jobs' names where this object acquired none."""
        if not self.nodes_of:
            jobs = self.living_jobs()
            own = [job for job in jobs if job.name == self._name and job.has_nodes]
            if own:
                self._adopt(own[-1], jobs)
        return bool(self.nodes_of)

    # Inside ---------------------------------------------------------------------------------------

    def _acquire_inside(
        self, failed: Collection[str], announce: Callable[[str], None], stopped: Callable[[], bool]
    ) -> bool:
        """Take the nodes of the job that this process runs in; the second time, when they are of no
        use any more, queue another one.

        Raises:
            BadInput: this is no job, or another one cannot be queued.
        """
        own = os.environ.get("SLURM_JOB_ID", "")
        if not own:
            raise BadInput(
                "cluster.slurm.holder=inside takes the nodes of the job that it runs in, and this "
                "is none; use opt-train submit"
            )
        if own in _TAKEN:
            self._queue_another(own, failed, announce)
            return False
        while not stopped():
            with contextlib.suppress(slurm.SlurmError):
                # By its name agents find it, and `opt-train stop` of a successor.
                slurm.ask("scontrol", "update", f"jobid={own}", f"jobname={self._name}")
                jobs = self.living_jobs()
                for other in jobs:
                    if other.name == self._name and other.job != own and other.has_nodes:
                        slurm.ask("scancel", other.job)  # of this run when it was held otherwise
                found = next((job for job in jobs if job.job == own), None)
                if found is not None and found.has_nodes:
                    self._adopt(found, jobs)
                    _TAKEN.add(own)
                    announce(f"nodes {','.join(self.nodes)} of this job, {own}")
                    return True
            time.sleep(ALLOCATE_POLL_SECONDS)
        return False

    def _queue_another(
        self, own: str, failed: Collection[str], announce: Callable[[str], None]
    ) -> None:
        script = self._run.submit / INSIDE
        if not script.is_file():
            raise BadInput(
                f"the nodes of job {own} are of no use to this run any more; submit it again"
                f"{' without ' + ','.join(sorted(failed)) if failed else ''}"
            )
        # Not requeued: a user may not change which nodes a job leaves out, and this one would be
        # given the failed ones again.
        try:
            excluded = _excluding([*failed, *self.spared(failed)])
            job = submit_script(script, f"--dependency=afterany:{own}", *excluded)
        except slurm.SlurmError as error:
            raise BadInput(f"the run could not be queued again ({error}); submit it") from None
        announce(f"queued again as Slurm job {job}, which begins when this one, {own}, has ended")

    # Giving it back -------------------------------------------------------------------------------

    def _withdraw(self) -> None:
        """Take back what is still pending."""
        with contextlib.suppress(slurm.SlurmError):
            for job in self.living_jobs():
                if job.state != "RUNNING":
                    slurm.ask("scancel", job.job)

    @property
    def outlives_supervisor(self) -> bool:
        """Whether this process is in a Slurm job of its own."""
        return os.environ.get("SLURM_JOB_ID", self.job) != self.job

    def release(self) -> None:
        """Give all allocations back; with them ends what still runs in them. The job that this
        process runs in goes on without agents: its script has the last word."""
        if self._asking is not None and self._asking.poll() is None:
            self._asking.terminate()
        own = os.environ.get("SLURM_JOB_ID", "") if self.is_inside else ""
        try:
            # What is pending by the run's own name may be the job that goes on when this one ends.
            living = [j for j in self.living_jobs() if not own or j.has_nodes or self._adds(j)]
            jobs = [job.job for job in living]
            if own in jobs:
                jobs.remove(own)
                # Cancelled, the job would end this process before the chronicle is written.
                for steps in slurm.steps_of([own], AGENT_STEP).values():
                    slurm.ask("scancel", "--signal=KILL", *steps)
            if jobs:
                slurm.ask("scancel", *jobs)
        except slurm.SlurmError as error:
            log.error(
                "the nodes were not given back: %s; try: scancel --name=%s,%s",
                error,
                self._name,
                self._addition,
            )


_TAKEN: set[str] = set()
"""Jobs whose nodes this process has taken, for `holder=inside`: taken again, they are used up."""


def _excluding(failed: Collection[str]) -> list[str]:
    # Another cluster's names, as of a run that began elsewhere, would be refused.
    excluded = sorted(slurm.all_nodes() & set(failed)) if failed else []
    return [f"--exclude={','.join(excluded)}"] if excluded else []
