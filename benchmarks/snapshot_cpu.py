"""What a snapshot into memory keeps a step from, against a plain copy of the same bytes in the same
run.

    python benchmarks/snapshot_cpu.py            OPT-125M, fp32: 1.5 GB of weights and moments,
    medians of 7 python benchmarks/snapshot_cpu.py --quick    a tiny model: whether it runs

*blocked* is what the loop waits for: beginning the snapshot, and the update that waits for its copy
after a real forward and backward pass. *new memory*: the first of them, into pages that nobody has
touched. The plain copy goes into tensors that have been written before. Let nothing else run
meanwhile.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from saved_model import CPU, SavedModel

from opt_train.checkpoint.snapshot import Snapshots

KEEP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    Benchmark(flags.quick, 2 if flags.quick else flags.rounds).run()


class Benchmark:
    def __init__(self, quick: bool, rounds: int) -> None:
        self._rounds = rounds
        self._model = SavedModel(quick)
        self._snapshots = Snapshots(0, KEEP, CPU)

    def run(self) -> None:
        print(
            f"{self._model.bytes / 1e9:.2f} GB of weights and moments, torch {torch.__version__}",
            flush=True,
        )
        for _ in range(2):
            self._model.step()
        alone = self._median(self._model.step)
        seconds = self._beside_training()
        copy = self._median(self._model.copy)
        blocked, beside = seconds["blocked"], seconds["step"]
        print(
            f"a snapshot             {seconds['whole']:8.3f} s from the beginning to the end, "
            "hashed"
        )
        print(f"blocked                {blocked:8.3f} s, {seconds['begin']:.3f} s of it to begin")
        print(f"a plain copy           {copy:8.3f} s")
        print(f"blocked/copy: {blocked / copy:.2f}x (aim: less than 1)")
        print(f"new memory/copy: {seconds['new'] / copy:.2f}x, the first time")
        print(
            f"a step                 {alone:8.3f} s alone, {beside:.3f} s while a snapshot is "
            "copied"
        )
        print(f"step/step: {beside / alone:.2f}x the time")

    def _median(self, action: Callable[[], float]) -> float:
        return statistics.median(action() for _ in range(self._rounds))

    def _beside_training(self) -> dict[str, float]:
        """Medians by what was measured; `new`: what the first one blocked."""
        measured: dict[str, list[float]] = {"begin": [], "blocked": [], "step": [], "whole": []}
        # The first ones make the memory that the later ones use.
        for step in range(KEEP + 1 + self._rounds):
            began = time.perf_counter()
            snapshot = self._snapshots.begin(step, self._model.engine.tensors(), {})
            begun = time.perf_counter() - began
            measured["step"].append(begun + self._model.step(snapshot))
            measured["begin"].append(begun)
            measured["blocked"].append(begun + self._model.waited)
            while not snapshot.wait(0.0):
                self._model.step()
            measured["whole"].append(snapshot.seconds)
        medians = {name: statistics.median(values[KEEP + 1 :]) for name, values in measured.items()}
        return {**medians, "new": measured["blocked"][0]}


if __name__ == "__main__":
    main()
