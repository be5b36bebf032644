"""Nodes for a moment: had as a run has them, used, given back."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.lock import Lock, LockHeld
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli.progress import announce
from opt_train.clusters.cluster import Cluster
from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.run_config import RunConfig, to_json
from opt_train.host import signals
from opt_train.protocol.exits import BadInput
from opt_train.run.code.frozen_code import freeze

SUFFIX = ".preflight"
"""Behind the run's name: the folder, and the allocation, are not the run's own, so that a run of
that name which lives is not disturbed."""
SPARE_SECONDS = 120.0
"""What nodes are asked for beside the time that the work takes."""
_POLL_SECONDS = 0.1

T = TypeVar("T")


def with_nodes(
    config: RunConfig, work: Callable[[Cluster, RunDirectory], T], seconds: float
) -> T | None:
    """What `work` returns, which is given the cluster with its nodes and a folder that these share,
    with the configuration in it; None: a signal came first. Folder and nodes are gone afterwards.

    Args:
        seconds: how long `work` takes at most.

    Raises:
        BadInput: there are no such nodes, or somebody else uses this folder.
    """
    folder = RunDirectory(Path(config.runs, config.name + SUFFIX).resolve())
    # Should this process be killed, a scheduler takes the nodes back after so long.
    nodes = config.cluster.for_seconds(seconds + SPARE_SECONDS)
    code = folder.path / "code" if config.cluster.hides_installation else None
    cluster = make_cluster(nodes, folder, code)
    cluster.check_before_start(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with Lock.acquire(folder):
            replace_file(folder.config_json, to_json(config).encode())
            # An image brings torch, and nothing of ours.
            if code is not None:
                freeze(code, config)
            try:
                return _on_nodes(cluster, folder, work)
            finally:
                # Nothing in it is of use later, and it must not be taken for a run.
                shutil.rmtree(folder.path, ignore_errors=True)
    except LockHeld as error:
        raise BadInput(f"another preflight of {config.name} is under way: {error}") from None


def _on_nodes(
    cluster: Cluster, folder: RunDirectory, work: Callable[[Cluster, RunDirectory], T]
) -> T | None:
    with signals.noted() as came:
        try:
            if not cluster.acquire((), announce=announce, stopped=came):
                return None
            # In a thread, so that this one, which alone takes signals, is free to.
            with ThreadPoolExecutor(1) as thread:
                working = thread.submit(work, cluster, folder)
                while not working.done() and not came():
                    time.sleep(_POLL_SECONDS)
                # Ends the programs that still run, and with them what waits for them.
                cluster.release()
            return None if came() else working.result()
        except BaseException:
            cluster.release()
            raise
