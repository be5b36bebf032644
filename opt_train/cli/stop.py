"""`opt-train stop`: a request in the run's inbox, which whoever leads the run obeys."""

import argparse
import getpass
import os
import socket

from opt_logbook.record import inbox, lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.protocol.exits import DONE, NO, BadInput
from opt_train.run.report import RunReport


def run(flags: argparse.Namespace) -> int:
    """Ask whoever leads the run at `flags.run` to save and stop."""
    path = flags.run
    directory = RunDirectory(path)
    report = RunReport(directory)
    # A request in the inbox of a run that nobody leads would stop the next start of it at once.
    holder = lock.live_holder_of(directory)
    if holder is None:
        print(f"nothing to stop: {report.headline}")
        return NO
    if not holder.leader:
        raise BadInput(
            f"{path} is trained by `opt-train train`, which obeys signals alone; "
            f"send TERM to process {holder.pid} on {holder.host}"
        )
    try:
        inbox.drop(directory, {"kind": "stop", "by": f"{_user()} on {socket.gethostname()}"})
    except OSError as error:
        fix = f"make it writable, or send TERM to process {holder.pid} on {holder.host}"
        raise BadInput(f"{directory.inbox} cannot be written ({error.strerror}); {fix}") from None
    print(
        f"asked {report.created.name} to save and stop; `opt-train status {path}` tells when it has"
    )
    return DONE


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in many containers
        return f"user {os.getuid()}"
