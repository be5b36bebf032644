"""`opt-train stop`: have a run save and stop, wherever it is in its life."""

import argparse
import time

from opt_logbook.record import inbox

from opt_train.cli.person import user_and_host
from opt_train.cli.requests.ways import (
    cancel,
    check_obeys_requests,
    jobs_of,
    needs_other_way,
)
from opt_train.clusters.cluster import JobTask
from opt_train.protocol.exits import DONE, NO
from opt_train.run.report.run_report import RunReport, report_of


def run(flags: argparse.Namespace) -> int:
    """Ask whoever leads the run at `flags.run` to save and stop, or take back the job in which
    somebody would."""
    report = report_of(flags.run)
    leadership = report.leadership
    if leadership.holder is None:
        return _stop_without_leader(report)
    check_obeys_requests(report)
    if report.hold is not None:
        print(f"nothing to stop: {report.headline}")
        return NO
    _drop(report)
    print(
        f"asked {report.name} to save and stop; `opt-train status {report.run.path}` tells when it "
        "has"
    )
    if silence := report.silence:
        print(silence)
    return DONE


def _drop(report: RunReport) -> None:
    with needs_other_way(report):
        inbox.drop(report.run, {"kind": "stop", "by": user_and_host()})


def _stop_without_leader(report: RunReport) -> int:
    jobs = jobs_of(report)
    waiting = [job for job in jobs if job.waits]
    leaders = [job for job in jobs if job.task is JobTask.SUPERVISOR]
    begins = any(not job.waits for job in leaders)
    if leaders and (begins or report.ranks_may_live(time.time())):
        # Ranks that train on without a leader are asked to save by the one that comes.
        _drop(report)
        print(
            f"asked {report.name} to stop, which Slurm job {leaders[0].job} obeys once it leads it"
        )
        return DONE
    # A request in the inbox of a run that nobody is about to lead would stop the next start of it
    # at once.
    if not waiting:
        print(f"nothing to stop: {report.headline}")
        return NO
    cancel(report, waiting)
    numbers = ", ".join(job.job for job in waiting)
    print(f"cancelled Slurm job {numbers}, which waited; {report.headline}")
    return DONE
