"""All tests of all nodes: each node by itself, then in pairs; what is bad, and why.

The nodes are somebody else's: whoever calls has them and gives them back. Programs are started on
them by `RunOn`, which every cluster pays, and report through their standard output. The folder that
all of them share holds the configuration, and for each meeting of two nodes the address of its
store.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from opt_logbook.record.run_directory import RunDirectory

from opt_train.burn_in.command import node_command, pair_command
from opt_train.burn_in.config import BurnInConfig
from opt_train.burn_in.pairing import Pair, pairings
from opt_train.burn_in.results import BurnInResult, BurnInTest, NodeReport, report_of, results_of
from opt_train.burn_in.verdict import ByNode, clock_results, compared, pair_results
from opt_train.diagnosis.causes import Cause
from opt_train.host.children import ProgramEnd

RunOn = Callable[[str, Sequence[str], float], ProgramEnd]
"""`Cluster.run_on`: node, command, seconds."""
LAUNCH_SECONDS = 30.0
"""From the order to the program's first instruction, on a busy node of a busy cluster."""


@dataclass(frozen=True, slots=True)
class ClusterPreflight:
    """Nodes to be tested, and how."""

    nodes: Sequence[str]
    run_on: RunOn
    folder: RunDirectory
    """Shared by all nodes; holds the configuration."""
    config: BurnInConfig
    same_machine: bool
    """The nodes share one: there is nothing to compare."""
    announce: Callable[[str], None]

    def results(self) -> ByNode:
        """Node -> what was found of it, with trouble where something is wrong."""
        found = self._alone()
        if not self.same_machine:
            found = compared(found, self.config)
        # A node whose program did not even end would only take its partners' time.
        able = [node for node in self.nodes if not _is_unable(found[node])]
        for node, results in self._in_pairs(able).items():
            found[node] += results
        return found

    def _alone(self) -> ByNode:
        self.announce(f"{len(self.nodes)} nodes: each is tested by itself")
        # All at once: the shared file system is to be tried as a run tries it.
        with ThreadPoolExecutor(len(self.nodes)) as threads:
            reports = list(threads.map(self._report, self.nodes))
        clocks = {r.node: ahead for r, ahead in reports if ahead is not None}
        found = {report.node: list(report.results) for report, _ in reports}
        for node, result in clock_results(clocks, self.config).items():
            found[node].append(result)
        return found

    def _report(self, node: str) -> tuple[NodeReport, float | None]:
        """What the node found of itself, and by how much its clock is ahead of this one."""
        command = node_command(self.folder.path, node)
        end = self.run_on(node, command, self.config.seconds + LAUNCH_SECONDS)
        came = time.time()
        try:
            report = replace(report_of(end.output), node=node)
        except ValueError as error:
            result = program_failed(end, str(error))
            self.announce(f"  {node}: {result.trouble}")
            return NodeReport(node, came, (result,)), None
        bad = sum(bool(result.trouble) for result in report.results)
        self.announce(f"  {node}: {len(report.results)} tests, {bad} failed")
        return report, report.ended - came

    def _in_pairs(self, nodes: Sequence[str]) -> ByNode:
        rounds = pairings(nodes, self.config.pair_rounds)
        met: list[tuple[Pair, BurnInResult]] = []
        with ThreadPoolExecutor(max(1, len(nodes))) as threads:
            for number, pairs in enumerate(rounds, start=1):
                self.announce(f"all-reduce in pairs, round {number} of {len(rounds)}")
                parts = [
                    (
                        threads.submit(self._meet, a, b, number, True),
                        threads.submit(self._meet, b, a, number, False),
                    )
                    for a, b in pairs
                ]
                met += [
                    (pair, _of_both(one.result(), other.result()))
                    for pair, (one, other) in zip(pairs, parts, strict=True)
                ]
                for (a, b), result in met[-len(pairs) :]:
                    if result.trouble:
                        self.announce(f"  {a} with {b}: {result.trouble}")
        return pair_results(met, self.config)

    def _meet(self, node: str, other: str, number: int, first: bool) -> BurnInResult:
        meeting = f"{number}-{node if first else other}"
        command = pair_command(self.folder.path, node, other, meeting, first)
        end = self.run_on(node, command, self.config.pair_seconds + LAUNCH_SECONDS)
        try:
            [result] = results_of(end.output)
        except ValueError as error:
            return replace(program_failed(end, str(error)), test=BurnInTest.PAIR)
        return result


def _of_both(one: BurnInResult, other: BurnInResult) -> BurnInResult:
    """A meeting as both saw it: it failed if one of them says so, else the slower counts."""
    if one.trouble or other.trouble:
        return one if one.trouble else other
    return min(one, other, key=lambda result: result.value or 0.0)


def program_failed(end: ProgramEnd, why: str) -> BurnInResult:
    """The result of a node whose test program printed none."""
    # What the launcher said is better than that nothing was printed: Slurm may have refused.
    if end.code is None:
        why = end.last_words or "its test program did not end in time"
    elif end.last_words:
        why = f"its test program: {end.last_words}"
    return BurnInResult(BurnInTest.PROGRAM, trouble=why, cause=Cause.NODE_FAILURE)


def _is_unable(results: Sequence[BurnInResult]) -> bool:
    return any(result.test == BurnInTest.PROGRAM for result in results)
