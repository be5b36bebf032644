"""What `stop`, `hold` and `resume` share: who of a run can be asked, and what else ends it."""

import contextlib
import errno
from collections.abc import Iterator

from opt_train.clusters.cluster import QueuedJob
from opt_train.protocol.exits import BadInput
from opt_train.run.report.leadership import place_of
from opt_train.run.report.run_report import RunReport


def obeys_signals_alone(report: RunReport) -> str:
    """Why a run without a supervisor cannot be asked, and what ends it."""
    holder = report.leadership.holder
    assert holder is not None
    return (
        f"{report.run.path} is trained by `opt-train train`, which obeys signals alone; "
        f"send TERM to {place_of(holder)}"
    )


def check_obeys_requests(report: RunReport) -> None:
    """Refuse where nobody would read a request.

    Raises:
        BadInput: a lone rank trains the run.
    """
    if not report.leadership.has_supervisor:
        raise BadInput(obeys_signals_alone(report))


@contextlib.contextmanager
def needs_other_way(report: RunReport) -> Iterator[None]:
    """Within it a request is left in the inbox.

    Raises:
        BadInput: it cannot be, as on a full disk; the sentence names what else ends the run.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make space" if full else "make it writable"
        raise BadInput(
            f"{report.run.inbox} cannot be written ({error.strerror}); {mend}{_other_way(report)}"
        ) from None


def _other_way(report: RunReport) -> str:
    holder = report.leadership.holder
    if holder is None:
        jobs = ", ".join(job.job for job in known_jobs(report))
        return f", or cancel what waits: scancel {jobs}" if jobs else ""
    if not (holder.slurm_job and holder.leader):
        return f", or send TERM to {place_of(holder)}"
    # TERM is how Slurm ends the job of a supervisor alone, whose ranks then train on.
    return (
        f", or send USR1 to {place_of(holder)}: "
        f"srun --jobid={holder.slurm_job} --overlap kill -USR1 {holder.pid}"
    )


def jobs_of(report: RunReport) -> tuple[QueuedJob, ...]:
    """The run's jobs that its scheduler has.

    Raises:
        BadInput: the scheduler does not answer.
    """
    try:
        return report.queue.jobs() if report.queue is not None else ()
    except OSError as error:
        raise BadInput(f"Slurm does not answer ({error}); try again when it does") from None


def cancel(report: RunReport, jobs: list[QueuedJob]) -> None:
    """Take jobs back that wait.

    Raises:
        BadInput: the scheduler refuses or does not answer.
    """
    assert report.queue is not None
    try:
        for job in jobs:
            report.queue.cancel(job.job)
    except OSError as error:
        raise BadInput(f"Slurm job {job.job} was not cancelled ({error}); try again") from None


def known_jobs(report: RunReport) -> tuple[QueuedJob, ...]:
    """As `jobs_of`; none where the scheduler does not answer."""
    try:
        return jobs_of(report)
    except BadInput:
        return ()
