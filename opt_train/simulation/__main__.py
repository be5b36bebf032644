"""Simulated runs from the command line: `python -m opt_train.simulation --seeds 20000`.

Each seed is one run with its disasters (histories.py). A seed that breaks an invariant is named
with what broke and the command that runs it again, and the exit code is 1.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from opt_train.simulation.histories import History
from opt_train.simulation.verdict import command_for, judge

SEEDS_AT_ONCE = 20
"""Seeds that a process takes at a time."""
PROGRESS_SEEDS = 500
BEGAN = 1.7e9 + 1000.0
"""Unix seconds at which every simulated run begins."""


def show(seed: int) -> int:
    """Run one seed, and print its journal; what it breaks is raised."""
    history = History(seed)
    try:
        history.run()
    finally:
        for entry in history.world.journal:
            seconds = entry.time - BEGAN
            print(f"{seconds:6.0f} s  {entry.attempt:5} step {entry.step}  {entry.event}")
    print(f"seed {seed}: {history.world.replayed.stage}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the seeds that `arguments` ask for; 1 if any broke an invariant."""
    parser = argparse.ArgumentParser(prog="python -m opt_train.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many (2000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    asked = parser.parse_args(arguments)
    if asked.seeds < 1 or asked.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if asked.seeds == 1:
        return show(asked.first)
    seeds = range(asked.first, asked.first + asked.seeds)
    with ProcessPoolExecutor(min(asked.jobs, asked.seeds)) as pool:
        verdicts = []
        for verdict in pool.map(judge, seeds, chunksize=SEEDS_AT_ONCE):
            verdicts.append(verdict)
            if verdict.broken:
                print(f"seed {verdict.seed}: {verdict.broken}")
                print(f"  again: {command_for(verdict.seed)}", flush=True)
            if len(verdicts) % PROGRESS_SEEDS == 0:
                print(f"{len(verdicts)} of {asked.seeds} seeds", flush=True)
    broken = sum(bool(verdict.broken) for verdict in verdicts)
    ends = Counter(verdict.end for verdict in verdicts if not verdict.broken)
    ends_listed = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{len(verdicts)} seeds: {ends_listed or 'none ended'}; {broken} broke an invariant")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
