"""`opt-train submit`: the supervisor's batch script, written down and given to the scheduler."""

import argparse
import shutil
import sys
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.jobs import compose_jobs, print_configurations
from opt_train.cli.run import held_at_rest
from opt_train.clusters.config import KINDS
from opt_train.clusters.make_cluster import make_cluster, make_submission
from opt_train.protocol.exits import DONE, STOPPED


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script and submit nothing"
    )


def run(flags: argparse.Namespace) -> int:
    """Write and submit the batch script of each job.

    Raises:
        BadInput: the configuration is wrong, or the scheduler refuses the script.
    """
    queued = [f"cluster={kind}" for kind, about in KINDS.items() if about.has_queue]
    named = any(override.startswith("cluster=") for override in flags.overrides)
    jobs = compose_jobs(flags, [*([] if named else queued[:1]), *flags.overrides])
    if flags.cfg:
        return print_configurations(jobs, flags.multirun)
    program = shutil.which("opt-train", path=str(Path(sys.executable).parent)) or "opt-train"
    code = DONE
    for job in jobs:
        directory = RunDirectory(job.config.run_path.resolve())
        submission = make_submission(job.config.cluster, directory)
        # The script says the cluster itself.
        arguments = [argument for argument in job.arguments if argument not in queued]
        script = submission.script(program, arguments)
        if flags.dry_run:
            print(script, end="")
            continue
        cluster = make_cluster(job.config.cluster, directory)
        cluster.check_before_start(job.config)
        if held := held_at_rest(directory, cluster):
            print(f"opt-train: {held}")
            code = STOPPED
            continue
        number, log = submission.submit(script)
        print(f"submitted {job.config.name} as job {number}; its log is {log}")
        print(f"opt-train status {directory.path} says how it is doing")
    return code
