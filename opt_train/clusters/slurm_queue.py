"""The jobs that Slurm has of a run: its supervisor's, and those that hold its nodes. Asked from a
login node, where the run may have no process at all yet."""

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.cluster import JobTask, QueuedJob
from opt_train.clusters.slurm_allocation import (
    INSIDE,
    SUPERVISOR,
    addition_name,
    allocation_name,
    submit_script,
    supervisor_name,
)
from opt_train.protocol.exits import BadInput


class SlurmQueue:
    """The run's jobs, found by their names, and its supervisor's by its number too."""

    def __init__(self, run: RunDirectory, supervisor_job: str = "") -> None:
        """
        Args:
            supervisor_job: the job that the run's lock names; a requeued one keeps its number.
        """
        self._run, self._supervisor_job = run, supervisor_job

    def jobs(self) -> tuple[QueuedJob, ...]:
        names = (supervisor_name(self._run), allocation_name(self._run), addition_name(self._run))
        found = slurm.living_jobs(*names)
        if self._supervisor_job and self._supervisor_job not in [job.job for job in found]:
            found += slurm.living_job(self._supervisor_job)
        return tuple(
            QueuedJob(job.job, self._task_of(job), job.state, job.reason, job.seconds_left)
            for job in found
        )

    def _task_of(self, job: slurm.SlurmJob) -> JobTask:
        if job.name == addition_name(self._run):
            return JobTask.MORE_NODES
        # Inside, the supervisor's job is the one that holds the nodes.
        is_inside = job.name == allocation_name(self._run) and self._script_name == INSIDE
        if is_inside or job.name == supervisor_name(self._run) or job.job == self._supervisor_job:
            return JobTask.SUPERVISOR
        return JobTask.NODES

    def cancel(self, job: str) -> None:
        slurm.ask("scancel", job)

    @property
    def _script_name(self) -> str:
        """The newest script by which the run was submitted; empty: none was."""
        # Both lie there where a person has changed the holder.
        scripts = [self._run.submit / name for name in (SUPERVISOR, INSIDE)]
        there = [path for path in scripts if path.is_file()]
        return max(there, key=lambda path: path.stat().st_mtime).name if there else ""

    @property
    def has_script(self) -> bool:
        return bool(self._script_name)

    def submit_again(self) -> str:
        path = self._run.submit / self._script_name
        try:
            return submit_script(path)
        except slurm.SlurmError as error:
            raise BadInput(f"Slurm refuses {path} ({error}); submit the run anew") from None
