"""The one place that picks a back end by its kind."""

from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.burn_in.site_power import SitePower
from opt_train.clusters.cluster import Cluster, RunQueue, Submission
from opt_train.clusters.config import KINDS, ClusterConfig
from opt_train.clusters.local import LocalCluster
from opt_train.clusters.slurm import SlurmCluster
from opt_train.clusters.slurm_queue import SlurmQueue
from opt_train.clusters.slurm_site import ask_slurm, powers_of
from opt_train.clusters.slurm_submission import SlurmSubmission
from opt_train.config.run_config import from_json
from opt_train.protocol.exits import BadInput


def make_cluster(config: ClusterConfig, run: RunDirectory, code: Path | None = None) -> Cluster:
    """The cluster of a run; nothing is started or asked yet.

    Args:
        code: the folder of packages from which agents and ranks run; None: the installation.

    Raises:
        BadInput: no back end is of this kind.
    """
    match config.kind:
        case "local":
            return LocalCluster(run, config, code)
        case "slurm":
            return SlurmCluster(run, config, code)
    raise BadInput(f"cluster.kind={config.kind} is not known; use {' or '.join(KINDS)}")


def scheduler_powers(config: ClusterConfig) -> list[SitePower]:
    """What the site's scheduler grants the user, whether the cluster is one of its or not."""
    return powers_of(ask_slurm(config.slurm.partition))


def make_submission(config: ClusterConfig, run: RunDirectory) -> Submission:
    """The batch job of a run's supervisor; nothing is submitted yet.

    Raises:
        BadInput: such a cluster has no queue.
    """
    if config.kind == "slurm":
        return SlurmSubmission(run, config)
    queued = " or ".join(kind for kind, about in KINDS.items() if about.has_queue)
    raise BadInput(
        f"cluster={config.kind} has no queue; use cluster={queued}, or `opt-train run` right here"
    )


def make_queue(run: RunDirectory, supervisor_job: str = "") -> RunQueue | None:
    """The scheduler's part of a run that may not have begun yet; None: no scheduler has any.

    Args:
        supervisor_job: the scheduler's job that the run's lock names.
    """
    queue = SlurmQueue(run, supervisor_job)
    return queue if supervisor_job or queue.has_script or _kind_of(run) == "slurm" else None


def _kind_of(run: RunDirectory) -> str:
    try:
        return from_json(run.config_json).cluster.kind
    except (OSError, ValueError, BadInput):  # it has not begun, or is broken in a way of its own
        return ""
