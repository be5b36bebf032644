"""`opt-train resume`: take a hold back, and have the run go on where somebody can be asked to."""

import argparse

from opt_train.cli.person import user_and_host
from opt_train.cli.requests.ways import jobs_of, needs_other_way
from opt_train.clusters.cluster import JobTask
from opt_train.protocol.exits import DONE, NO, BadInput
from opt_train.run.hold_requests import ask_resume
from opt_train.run.report.run_report import RunReport, report_of
from opt_train.run.state import Stage

START = "the command that started it goes on with it"


def run(flags: argparse.Namespace) -> int:
    """Take back the hold on the run at `flags.run`.

    Raises:
        BadInput: the inbox cannot be written, or the scheduler refuses to queue the run again.
    """
    report = report_of(flags.run)
    if report.hold is None:
        print(f"not held: {report.headline}{_next_for_a_person(report)}")
        return NO
    with needs_other_way(report):
        ask_resume(report.run, user_and_host())
    print(f"took back the hold on {report.name}; {_what_follows(report)}")
    return DONE


def _what_follows(report: RunReport) -> str:
    """How the run goes on that is held no more."""
    if report.leadership.has_supervisor:
        return "its supervisor goes on with it, once it has saved if it was asked to"
    if report.leadership.holder is not None:
        return "it is being trained"
    if report.state.stage is Stage.HALTED:
        return f"it has halted: {report.state.question}{_next_for_a_person(report)}"
    try:
        queued = [job for job in jobs_of(report) if job.task is JobTask.SUPERVISOR]
    except BadInput as error:  # it is held no more, whatever its scheduler says
        return f"whether a job of it waits is not known: {error}, or start it"
    # Of two supervisors the second would find the lock taken, and fail.
    if queued:
        return f"Slurm job {queued[0].job} ({queued[0].state}) goes on with it"
    if report.queue is not None and report.queue.has_script:
        return f"submitted it again as Slurm job {report.queue.submit_again()}"
    return START


def _next_for_a_person(report: RunReport) -> str:
    """What a person does whose run rests, and is not held."""
    if report.leadership.holder is not None or report.state.stage is Stage.FINISHED:
        return ""
    mended = "when that is mended, " if report.state.stage is Stage.HALTED else ""
    return f"; {mended}{START}"
