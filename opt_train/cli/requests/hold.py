"""`opt-train hold`: have a run save and stop, and let nothing start it until it is resumed."""

import argparse
import time

from opt_train.cli.person import user_and_host
from opt_train.cli.requests.ways import known_jobs, needs_other_way, obeys_signals_alone
from opt_train.clusters.cluster import JobTask
from opt_train.protocol.exits import DONE, NO
from opt_train.run.hold_requests import ask_hold
from opt_train.run.report.run_report import RunReport, report_of
from opt_train.run.state import Stage


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reason", default="", metavar="TEXT", help="why, for whoever finds the run held"
    )


def run(flags: argparse.Namespace) -> int:
    """Put a hold on the run at `flags.run`, whoever leads it or nobody."""
    report = report_of(flags.run)
    if report.state.stage is Stage.FINISHED:
        print(f"nothing to hold: {report.headline}")
        return NO
    if report.hold is not None:
        print(f"{report.name} is held already, {report.hold}")
        return DONE
    with needs_other_way(report):
        ask_hold(report.run, user_and_host(), " ".join(flags.reason.split()))
    print(f"{_what_follows(report)}; `opt-train resume {report.run.path}` takes the hold back")
    if silence := report.silence:
        print(silence)
    return DONE


def _what_follows(report: RunReport) -> str:
    """What becomes of the run that is held from now on."""
    name, leadership = report.name, report.leadership
    if leadership.has_supervisor:
        return f"asked {name} to save, give its nodes back and begin nothing more"
    if leadership.holder is not None:
        return f"{name} is not started again; it goes on now, for {obeys_signals_alone(report)}"
    sentence = f"{name} is held: nothing starts it"
    # They stay in the queue: where the hold is taken back before they begin, nothing was lost.
    waiting = [job.job for job in known_jobs(report) if job.task is JobTask.SUPERVISOR]
    if waiting:
        sentence += f", and Slurm job {', '.join(waiting)} ends as soon as it begins"
    if report.ranks_may_live(time.time()):
        sentence += f"; {report.orphans}"
    return sentence
