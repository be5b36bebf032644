"""`opt-train status`: how a run is doing."""

import argparse
import json

from opt_logbook.record.run_directory import RunDirectory

from opt_train.protocol.exits import DONE
from opt_train.run.report import RunReport
from opt_train.run.state import TERMINAL


def run(flags: argparse.Namespace) -> int:
    """Print how the run at `flags.run` is doing."""
    report = RunReport(RunDirectory(flags.run))
    if flags.json:
        print(json.dumps(report.payload(), indent=2))
        return DONE
    print(report.headline)
    print(f"  attempt {report.payload()['attempt'] or '-'}, {report.progress}")
    nodes = (
        ", ".join(f"{name} {node.role}" for name, node in sorted(report.state.nodes.items()))
        or "none"
    )
    print(f"  {'nodes at the end' if report.stage in TERMINAL else 'nodes'}: {nodes}")
    print("\n".join(report.incident_lines()))
    return DONE
