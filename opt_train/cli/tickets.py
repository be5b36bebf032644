"""`opt-train tickets`: what to tell an admin of the nodes that a run has taken out."""

import argparse
import json
from dataclasses import asdict

from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

from opt_train.protocol.exits import DONE
from opt_train.run.report.run_report import RunReport
from opt_train.run.report.tickets import tickets


def run(flags: argparse.Namespace) -> int:
    """Print a ticket for each node that the run at `flags.run` has taken out."""
    directory = RunDirectory(flags.run)
    name = RunReport(directory).created.name  # a sentence where there is no run
    made = tickets(read(directory.journal).entries)
    if flags.json:
        print(json.dumps([asdict(ticket) for ticket in made], indent=2))
    elif made:
        print("\n\n".join(ticket.text(name) for ticket in made))
    else:
        print(f"{name}: no node has been taken out")
    return DONE
