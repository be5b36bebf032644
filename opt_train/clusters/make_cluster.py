"""The one place that picks a back end by its kind."""

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import Cluster
from opt_train.clusters.config import KINDS, ClusterConfig
from opt_train.clusters.local import LocalCluster
from opt_train.protocol.exits import BadInput


def make_cluster(config: ClusterConfig, run: RunDirectory) -> Cluster:
    """The cluster of a run; nothing is started or asked yet.

    Raises:
        BadInput: no back end is of this kind.
    """
    match config.kind:
        case "local":
            return LocalCluster(run, config)
    raise BadInput(f"cluster.kind={config.kind} is not known; use {' or '.join(KINDS)}")
