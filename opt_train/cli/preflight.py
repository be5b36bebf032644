"""`opt-train preflight`: nodes as a run would get them, tested and given back."""

import argparse
import json
from dataclasses import asdict
from functools import partial

from opt_logbook.record.run_directory import RunDirectory

from opt_train.burn_in.config import BurnInConfig
from opt_train.burn_in.preflight import LAUNCH_SECONDS, ClusterPreflight
from opt_train.burn_in.results import BurnInResult
from opt_train.burn_in.verdict import ByNode, in_words
from opt_train.cli.borrowed_nodes import with_nodes
from opt_train.cli.jobs import UNREAD, compose_jobs, print_configurations
from opt_train.cli.preflight_site import report_site
from opt_train.cli.progress import announce, columns
from opt_train.clusters.cluster import Cluster
from opt_train.clusters.config import KINDS
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import DONE, INTERRUPTED, NO
from opt_train.run.report.tickets import asked_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a program")
    parser.add_argument(
        "--site",
        action="store_true",
        help="test nothing; say which powers the site grants, asked of the scheduler and one node",
    )


def run(flags: argparse.Namespace) -> int:
    """Test the nodes that the configuration asks for; `NO` if one of them failed.

    Raises:
        BadInput: the configuration is wrong, or there are no such nodes.
    """
    jobs = compose_jobs(flags, [*UNREAD, *flags.overrides])
    if flags.cfg:
        return print_configurations(jobs, flags.multirun)
    report = report_site if flags.site else _preflight
    return max(report(job.config, flags.json) for job in jobs)


def _preflight(config: RunConfig, as_json: bool) -> int:
    found = with_nodes(config, partial(_test, config), longest_seconds(config.burn_in))
    if found is None:
        return INTERRUPTED
    print(_as_json(found) if as_json else _table(found))
    return NO if _failed_nodes(found) else DONE


def longest_seconds(burn_in: BurnInConfig) -> float:
    """What all tests take at most."""
    rounds = burn_in.pair_rounds
    return burn_in.seconds + rounds * burn_in.pair_seconds + (1 + rounds) * LAUNCH_SECONDS


def _test(config: RunConfig, cluster: Cluster, folder: RunDirectory) -> ByNode:
    return ClusterPreflight(
        cluster.node_names,
        cluster.run_on,
        folder,
        config.burn_in,
        same_machine=KINDS[config.cluster.kind].nodes_share_machine,
        announce=announce,
    ).results()


# What is printed ----------------------------------------------------------------------------------


def _failed_nodes(found: ByNode) -> list[str]:
    return [node for node, results in found.items() if any(r.trouble for r in results)]


def _as_json(found: ByNode) -> str:
    nodes = {node: [asdict(result) for result in results] for node, results in found.items()}
    return json.dumps({"failed": _failed_nodes(found), "nodes": nodes}, indent=2)


def _table(found: ByNode) -> str:
    """A line a node and test, where all is well; one for each thing that is not."""
    head = ("node", "test", "value", "verdict", "what to do")
    rows = [head, *(row for node, results in found.items() for row in _rows(node, results))]
    failed = _failed_nodes(found)
    last = f"{len(found)} nodes, all well"
    if failed:
        last = f"{len(failed)} of {len(found)} nodes failed: {', '.join(failed)}"
    return "\n".join([*columns(rows), last])


def _rows(node: str, results: list[BurnInResult]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for test in dict.fromkeys(result.test for result in results):
        of_test = [result for result in results if result.test == test]
        bad = [result for result in of_test if result.trouble]
        # Of several slots the slowest.
        least = min(of_test, key=lambda result: result.value or 0.0)
        # A thousand slots that are well are not worth a thousand lines.
        for result in bad or [least]:
            value = "-" if result.value is None else in_words(result.value, result.unit)
            asked = asked_of(result.cause, result.detail) if result.trouble else ""
            well = f"well ({result.remark})" if result.remark else "well"
            rows.append((node, test, value, result.trouble or well, asked))
    return rows
