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

PROGRAMS = ("salloc", "srun", "squeue", "scancel", "scontrol", "sinfo")
ANSWER_SECONDS = 20.0
"""A busy controller answers late; one that is away does not answer at all."""
ALIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"

log = logging.getLogger(__name__)


class SlurmError(OSError):
    """Slurm refused, or did not answer: nothing is known."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job as `squeue` shows it. `nodes` is a Slurm list such as ``n[1-3]``, empty while it is
    pending."""

    job: str
    state: str
    nodes: str
    reason: str


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


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


def find_allocation(name: str) -> SlurmJob | None:
    """The newest living job of this user with this name."""
    found = ask(
        *("squeue", "--noheader", f"--user={os.getuid()}", f"--name={name}"),
        *(f"--states={ALIVE_STATES}", "--format=%A|%T|%N|%r"),
    )
    # One that is ending has its nodes for another moment, and is no home for anybody.
    living = [line for line in lines_of(found) if line[1] != "COMPLETING"]
    newest = max(living, key=lambda line: int(line[0]), default=None)
    return None if newest is None else SlurmJob(*newest)


def state_of(job: str) -> tuple[str, float | None]:
    """``RUNNING`` and so on (empty: Slurm has forgotten the job, or never knew it), and the seconds
    until its time limit, None where there is none."""
    try:
        found = ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T|%L")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return "", None
        raise
    for state, left in lines_of(found):
        return state, seconds_of(left)
    return "", None


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


def steps_of(job: str, name: str) -> dict[str, list[str]]:
    """Node -> the living steps called `name` that the job has there, as ``17.3``."""
    found = ask("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i|%j|%N")
    steps: dict[str, list[str]] = {}
    for step, called, node in lines_of(found):
        if called == name:
            steps.setdefault(node, []).append(step)
    return steps


def lines_of(text: str) -> Iterable[Sequence[str]]:
    """The lines of an answer whose format separates its fields by ``|``."""
    return [line.split("|") for line in text.splitlines() if line.strip()]
