"""The one place that picks a back end by its kind."""

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import Cluster, Submission
from opt_train.clusters.config import KINDS, ClusterConfig
from opt_train.clusters.local import LocalCluster
from opt_train.clusters.slurm import SlurmCluster
from opt_train.clusters.slurm_submission import SlurmSubmission
from opt_train.protocol.exits import BadInput


def make_cluster(config: ClusterConfig, run: RunDirectory) -> Cluster:
    """The cluster of a run; nothing is started or asked yet.

    Raises:
        BadInput: no back end is of this kind.
    """
    match config.kind:
        case "local":
            return LocalCluster(run, config)
        case "slurm":
            return SlurmCluster(run, config)
    raise BadInput(f"cluster.kind={config.kind} is not known; use {' or '.join(KINDS)}")


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
