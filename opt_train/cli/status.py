"""`opt-train status`: where a run is, what it does, what it waits for, what comes next."""

import argparse
import json
import time
from dataclasses import asdict

from opt_logbook.story.format import printable

from opt_train.clusters.cluster import QueuedJob
from opt_train.protocol.exits import DONE
from opt_train.run.report.outlook import Outlook, outlook_of
from opt_train.run.report.run_report import RunReport, report_of
from opt_train.run.state import HELD, TERMINAL


def run(flags: argparse.Namespace) -> int:
    """Print how the run at `flags.run` is doing. Changes nothing."""
    report = report_of(flags.run)
    jobs, unanswered = _jobs_of(report)
    outlook = outlook_of(report, jobs, time.time())
    if flags.json:
        scheduler = {"jobs": [asdict(job) for job in jobs], "scheduler_unanswered": unanswered}
        print(json.dumps(report.payload() | asdict(outlook) | scheduler, indent=2))
        return DONE
    lines = [report.headline, *_lines_of(outlook)]
    if unanswered:
        lines.append(f"  Slurm does not answer: {unanswered}")
    nodes = [f"{name} {node.role}" for name, node in sorted(report.state.nodes.items())]
    over = report.stage in TERMINAL or report.stage == HELD
    lines.append(f"  {'nodes at the end' if over else 'nodes'}: {', '.join(nodes) or 'none'}")
    # Questions and evidence may quote a log, which must not command a terminal.
    print(
        "\n".join(
            printable(line)
            for line in (
                *lines,
                *report.lemon_lines(),
                *report.incident_lines(),
                *report.instability_lines(),
            )
        )
    )
    return DONE


def _lines_of(outlook: Outlook) -> list[str]:
    named = {
        "where": outlook.where,
        "doing": outlook.doing,
        "waiting for": outlook.waiting_for or ("nothing",),
        "next": outlook.next or ("nothing",),
    }
    return [
        f"  {name}: {', '.join(phrases) if name == 'doing' else '; '.join(phrases)}"
        for name, phrases in named.items()
    ]


def _jobs_of(report: RunReport) -> tuple[tuple[QueuedJob, ...], str]:
    """The jobs that the run's scheduler has, and why it could not be asked."""
    try:
        return (report.queue.jobs() if report.queue is not None else ()), ""
    except OSError as error:
        return (), str(error)
