"""``python -m opt_train.burn_in.pair --run DIR --node NAME --other NAME --meeting NAME [--first]``:
one node's part in an all-reduce with another node, printed as one line of results.

As many ranks as the node has slots take part, each a child that may hang; this program itself
imports no torch.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.burn_in.results import BurnInResult, BurnInTest, results_of, to_line
from opt_train.config.run_config import RunConfig, from_json
from opt_train.diagnosis.causes import Cause
from opt_train.host import signals
from opt_train.host.children import KillableChild, ProgramEnd

REPORT_SECONDS = 5.0
MEETINGS = "meetings"
"""Folder of the run directory where the first of two nodes says where its store listens."""


def main(arguments: list[str]) -> int:
    """Print what this node saw of the meeting."""
    signals.ignore()
    parser = argparse.ArgumentParser(prog="python -m opt_train.burn_in.pair")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--node", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--meeting", required=True, help="its name, the same on both nodes")
    parser.add_argument("--first", action="store_true", help="this node has the store")
    given = parser.parse_args(arguments)
    run = RunDirectory(given.run.resolve())
    config = from_json(run.config_json)
    run.make_folder(run.path / MEETINGS)
    address = run.path / MEETINGS / f"{given.meeting}.json"
    seconds = config.burn_in.pair_seconds
    deadline = time.monotonic() + _rank_seconds(config)
    # All before any is waited for: they wait for one another.
    ranks = [
        KillableChild(_rank_command(config, slot, given.first, address), _environment(config))
        for slot in range(config.cluster.slots_per_node)
    ]
    ends = [rank.ended_by(deadline) for rank in ranks]
    print(to_line([meeting_of([_read(end, seconds) for end in ends], given.other)]))
    return 0


def _rank_command(config: RunConfig, slot: int, first: bool, address: Path) -> list[str]:
    slots = config.cluster.slots_per_node
    return [
        *(sys.executable, "-P", "-m", "opt_train.burn_in.pair_rank"),
        *("--device", config.train.device, "--slot", str(slot), "--slots", str(slots)),
        *("--address", str(address), "--interface", config.cluster.collectives_interface),
        *("--bytes", str(config.burn_in.pair_bytes)),
        *("--seconds", str(_rank_seconds(config))),
        *(["--first"] if first else []),
    ]


def _rank_seconds(config: RunConfig) -> float:
    return max(1.0, config.burn_in.pair_seconds - REPORT_SECONDS)


def _environment(config: RunConfig) -> dict[str, str]:
    interface = config.cluster.collectives_interface
    named = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    # NCCL says in its log alone whether it goes over InfiniBand.
    return {**os.environ, "NCCL_DEBUG": "INFO", **(named if interface else {})}


def _read(end: ProgramEnd, seconds: float) -> BurnInResult:
    """One rank's result."""
    if end.code == 0:
        try:
            [result] = results_of(end.output)
        except ValueError as error:
            return _failed(str(error))
        fabric = fabric_of(end.output + end.errors)
        return replace(result, remark=f"over {fabric}") if fabric else result
    if end.code is None:
        return _failed(f"it has not ended within {seconds:g} s")
    return _failed(end.last_words or f"it ended with code {end.code}")


def _failed(why: str) -> BurnInResult:
    return BurnInResult(BurnInTest.PAIR, trouble=why, cause=Cause.NETWORK)


def fabric_of(log: str) -> str:
    """The network that NCCL writes it uses, such as ``IB`` or ``Socket``; empty: it does not."""
    found = re.findall(r"NCCL INFO Using network (\S+)", log)
    return found[-1] if found else ""


def meeting_of(ranks: list[BurnInResult], other: str) -> BurnInResult:
    """What all ranks of this node saw: the first that failed, else the slowest."""
    failed = [result for result in ranks if result.trouble]
    # Of several that failed the first may be the cause, and the others its victims.
    worst = failed[0] if failed else min(ranks, key=lambda result: result.value or 0.0)
    return replace(worst, part=f"with {other}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
