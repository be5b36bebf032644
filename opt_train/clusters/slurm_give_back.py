"""``python -m opt_train.clusters.slurm_give_back RUN``: cancel what a run holds and nobody uses.

An agent that nobody leads calls it when it has left. It may be one that was cut off alone, while
the run trains on: so nothing is cancelled while a supervisor lives, which touches the run's lock
every few seconds. What Slurm says of the other agents is no sign: it takes the steps of a node that
has just died for alive. What is still asked for is taken back too: nodes that come when nobody
leads would be forgotten.

Where the supervisor sat on the first of the nodes (`cluster.slurm.holder=inside`), that node is
what was lost: Slurm is asked to queue the job again instead, and the run goes on with others.
"""

import os
import sys
import time
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.slurm_allocation import addition_name, allocation_name
from opt_train.config.run_config import from_json

LED_SECONDS = 30.0
"""A lock that has not been touched for this long is nobody's: several times what a supervisor takes
between two touches."""
AGAIN_SECONDS = 10.0
TRY_SECONDS = 3600.0
"""A controller that is away for longer finds the allocation at its time limit."""


def give_back(run: RunDirectory) -> None:
    """Cancel the allocations of `run` unless a supervisor leads it."""
    deadline = time.monotonic() + TRY_SECONDS
    while time.monotonic() < deadline:
        try:
            if _is_led(run):
                print("a supervisor leads the run: its nodes are kept", flush=True)
                return
            _let_go(run)
            return
        except OSError as error:  # Slurm's too
            print(f"the nodes were not given back yet: {error}", flush=True)
        time.sleep(AGAIN_SECONDS)


def _is_led(run: RunDirectory) -> bool:
    """Whether somebody touches the run's lock. Two readings, so that no two clocks are compared.

    Raises:
        OSError: the run directory cannot be read now.
    """
    # A supervisor whose file system stands still for this long, and that has lost this node too, is
    # taken for dead. Both at once are rarer than a node that nobody would ever give back.
    before = _touched(run)
    time.sleep(LED_SECONDS)
    return _touched(run) != before


def _touched(run: RunDirectory) -> int:
    # Opened, not only asked for: a client of NFS that opens a file asks the server.
    try:
        descriptor = os.open(run.lock, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _let_go(run: RunDirectory) -> None:
    if from_json(run.config_json).cluster.slurm.holder != "inside":
        jobs = [job.job for job in slurm.living_jobs(allocation_name(run), addition_name(run))]
        if jobs:
            slurm.ask("scancel", *jobs)
        return
    # First what was added: queueing the own job again ends this process too. One that is pending
    # by the run's own name is the run's next job already.
    additions = [job.job for job in slurm.living_jobs(addition_name(run))]
    if additions:
        slurm.ask("scancel", *additions)
    for job in slurm.living_jobs(allocation_name(run)):
        if job.has_nodes:
            print(f"job {job.job} is queued again", flush=True)
            slurm.ask("scontrol", "requeue", job.job)


if __name__ == "__main__":
    give_back(RunDirectory(Path(sys.argv[1])))
