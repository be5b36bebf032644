"""Slurm as its commands show it: asked in a clean environment, with a deadline, one question each.

The commands, not a library: they are on every site, speak for the user who calls them, and their
formats (`--format`) have held for decades.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PROGRAMS = ("srun", "squeue", "scancel", "scontrol", "sinfo")
ANSWER_SECONDS = 20.0
"""A busy controller answers late; one that is away does not answer at all."""
ALIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"
WORKING = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
"""States of nodes that work, as ``sinfo`` begins them."""

log = logging.getLogger(__name__)


class SlurmError(OSError):
    """Slurm refused, or did not answer: nothing is known."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job as `squeue` shows it."""

    job: str
    name: str
    state: str
    nodes: str
    """A Slurm list such as ``n[1-3]``, empty while it is pending."""
    reason: str
    seconds_left: float | None
    """Until its time limit; None: it has none."""

    @property
    def has_nodes(self) -> bool:
        return self.state == "RUNNING" and bool(self.nodes)


def missing_programs(holder: str = "outside") -> list[str]:
    """What is not on the PATH of what is needed, with nodes that `holder` holds."""
    asks = "salloc" if holder == "outside" else "sbatch"
    return [program for program in (asks, *PROGRAMS) if shutil.which(program) is None]


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment` without what Slurm left in it: an inherited ``SLURM_NNODES`` once made an
    ``srun -N3`` run on one of three nodes, with exit code 0."""
    prefixes = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_")
    kept = {k: v for k, v in environment.items() if not k.startswith(prefixes)}
    if "SLURM_CONF" in environment:  # where the site's configuration is, not what a job was given
        kept["SLURM_CONF"] = environment["SLURM_CONF"]
    return kept


def ask(*command: str, seconds: float = ANSWER_SECONDS) -> str:
    """Standard output of a Slurm command.

    Raises:
        SlurmError: it refused, is not there, or did not answer.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=clean_environment(),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} has not answered for {seconds:g} s") from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]}: {said}")
    return done.stdout


def living_jobs(*names: str) -> list[SlurmJob]:
    """The living jobs of this user with one of these names, oldest first."""
    return _living(f"--name={','.join(names)}")


def living_job(job: str) -> list[SlurmJob]:
    """The job of this number, if it is one of this user's and lives."""
    try:
        return _living(f"--jobs={job}")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # Slurm has forgotten it
            return []
        raise


def _living(which: str) -> list[SlurmJob]:
    found = ask(
        *("squeue", "--noheader", f"--user={os.getuid()}", which),
        *(f"--states={ALIVE_STATES}", "--format=%A|%j|%T|%N|%L|%r"),
    )
    living = [
        SlurmJob(job, name, state, nodes, reason, seconds_of(left))
        for job, name, state, nodes, left, reason in lines_of(found)
        # One that is ending has its nodes for another moment, and is no home for anybody.
        if state != "COMPLETING"
    ]
    return sorted(living, key=lambda job: int(job.job))


def state_of(job: str) -> str:
    """``CANCELLED`` and so on; empty: Slurm has forgotten the job, or never knew it."""
    try:
        found = ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return ""
        raise
    return found.strip()


def seconds_of(time: str) -> float | None:
    """Seconds of a time as Slurm writes it: ``1-02:03:04``, ``03:04``; None for ``UNLIMITED``."""
    days, _, clock = time.strip().rpartition("-")
    parts = [days or "0", *clock.split(":")]
    if not all(part.isdigit() for part in parts):
        return None
    seconds = 0
    for part in parts[1:]:
        seconds = 60 * seconds + int(part)
    return 86400.0 * int(parts[0]) + seconds


def hostnames(nodes: str) -> tuple[str, ...]:
    """The nodes of a Slurm list, such as ``n[1-3]``, in its order."""
    return tuple(ask("scontrol", "show", "hostnames", nodes).split()) if nodes else ()


def node_states(nodes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Node -> state as ``sinfo`` writes it (``mixed``, ``down*``), reason (empty for none)."""
    found = ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E")
    return {name: (state, "" if why == "none" else why) for name, state, why in lines_of(found)}


def all_nodes() -> frozenset[str]:
    """Every node that the cluster has."""
    return frozenset(ask("sinfo", "--noheader", "--Node", "--format=%N").split())


def working_nodes(partition: str) -> frozenset[str]:
    """The nodes of `partition` (empty: of all) that are neither down nor wanted back, whoever uses
    them now."""
    chosen = [f"--partition={partition}"] if partition else []
    found = ask("sinfo", "--noheader", "--Node", *chosen, "--format=%N|%T")
    # A star: the node does not answer.
    return frozenset(
        name for name, state in lines_of(found) if state.startswith(WORKING) and state[-1] != "*"
    )


def steps_of(jobs: Iterable[str], name: str) -> dict[str, list[str]]:
    """Node -> the living steps called `name` that the jobs have there, as ``17.3``."""
    found = ask("squeue", "--noheader", "--steps", f"--jobs={','.join(jobs)}", "--format=%i|%j|%N")
    steps: dict[str, list[str]] = {}
    for step, called, node in lines_of(found):
        if called == name:
            steps.setdefault(node, []).append(step)
    return steps


def lines_of(text: str) -> Iterable[Sequence[str]]:
    """The lines of an answer whose format separates its fields by ``|``."""
    return [line.split("|") for line in text.splitlines() if line.strip()]
