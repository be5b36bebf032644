"""`opt-train preflight --site`: which powers a site grants an ordinary user, and what follows."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.burn_in.command import host_command
from opt_train.burn_in.host_powers import powers_in
from opt_train.burn_in.site_power import Granted, SitePower
from opt_train.cli.borrowed_nodes import with_nodes
from opt_train.cli.progress import announce, columns
from opt_train.clusters.cluster import Cluster
from opt_train.clusters.make_cluster import scheduler_powers
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import DONE, BadInput

HOST_SECONDS = 120.0
"""For one node's answers."""


def report_site(config: RunConfig, as_json: bool) -> int:
    """Print what the scheduler grants, and what a node does; a site that grants nothing is an
    answer too."""
    powers = scheduler_powers(config.cluster)
    announce("asking a node what it grants")
    powers += _node_powers(config)
    if as_json:
        print(json.dumps([asdict(power) for power in powers], indent=2))
        return DONE
    head = ("power", "granted", "found out by", "what opt_train does")
    rows = [head, *((p.power, p.granted.value, p.found, p.then) for p in powers)]
    print("\n".join(columns(rows)))
    return DONE


def _node_powers(config: RunConfig) -> list[SitePower]:
    """What one node of the cluster says of itself; unknown where none is to be had."""
    # One stands for all: each takes its time in the queue, and a site rarely tells them apart.
    cluster = replace(config.cluster, nodes=1, buffer_nodes=0)
    folder = Path(config.runs).resolve()

    def ask(nodes: Cluster, _: RunDirectory) -> list[SitePower]:
        end = nodes.run_on(nodes.node_names[0], host_command(folder), HOST_SECONDS)
        try:
            return powers_in(end.output)
        except ValueError as error:
            return [_unknown(end.last_words or str(error))]

    try:
        powers = with_nodes(replace(config, cluster=cluster), ask, HOST_SECONDS)
    except BadInput as error:
        return [_unknown(str(error))]
    return [_unknown("stopped before there was a node")] if powers is None else powers


def _unknown(why: str) -> SitePower:
    then = "ask again when a node is to be had"
    return SitePower("what a node grants", Granted.UNKNOWN, why, then)
