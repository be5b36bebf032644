"""``python -m opt_train.clusters.slurm_give_back RUN JOB``: cancel a job that nobody uses.

An agent that nobody leads calls it when it has left. It may be one that was cut off alone, while
the run trains on: so the job is cancelled only where no agent is both registered in the run
directory and alive as a step of the job. One that leaves has taken its registration back, so of
several that leave together each finds nobody, and each cancels.
"""

import sys
import time
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.registration import read_registration
from opt_train.clusters.slurm import AGENT_STEP

LEAVING_SECONDS = 3.0
"""For others that leave at the same moment to take their registration back."""
AGAIN_SECONDS = 10.0
TRY_SECONDS = 3600.0
"""A controller that is away for longer finds the allocation at its time limit."""


def give_back(run: RunDirectory, job: str) -> None:
    """Cancel `job` unless an agent of `run` lives in it that somebody leads."""
    deadline = time.monotonic() + TRY_SECONDS
    time.sleep(LEAVING_SECONDS)
    while time.monotonic() < deadline:
        try:
            steps = slurm.steps_of(job, AGENT_STEP)
            led = [node for node in steps if read_registration(run, node) is not None]
            if led:
                print(f"{', '.join(led)} still used: job {job} is kept", flush=True)
                return
            slurm.ask("scancel", job)
            return
        except slurm.SlurmError as error:
            print(f"job {job} was not given back yet: {error}", flush=True)
        time.sleep(AGAIN_SECONDS)


if __name__ == "__main__":
    give_back(RunDirectory(Path(sys.argv[1])), sys.argv[2])
