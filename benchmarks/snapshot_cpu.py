"""What a snapshot into memory keeps a step from, against a plain copy of the same bytes in the same run.

    python benchmarks/snapshot_cpu.py            OPT-125M, fp32: 1.5 GB of weights and moments, medians of 7
    python benchmarks/snapshot_cpu.py --quick    a tiny model: whether it runs

*blocked* is what the loop waits for: beginning the snapshot, and the update that waits for its copy after a real
forward and backward pass. *new memory*: the first of them, into pages that nobody has touched. The plain copy goes into
tensors that have been written before. Let nothing else run meanwhile.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from contestants import OPT_125M, QUICK, VALUES, micro_batch

from opt_train.checkpoint.snapshot import Snapshot, Snapshots
from opt_train.data.batches import MicroBatch
from opt_train.optim.clip import clip
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine

CPU = torch.device("cpu")
KEEP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    Benchmark(flags.quick, 2 if flags.quick else flags.rounds).run()


class Benchmark:
    def __init__(self, quick: bool, rounds: int) -> None:
        torch.set_num_threads(2)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        config, length = (QUICK, 64) if quick else (OPT_125M, 512)
        self._rounds = rounds
        self._engine = make_engine(
            config, PrecisionConfig(compute="fp32"), ParallelConfig(), Layout(1, 1, 1), CPU, values=VALUES, seed=0
        )
        tokens, targets = micro_batch(config, 1, length)
        self._batch = MicroBatch(tokens, targets, torch.ones(1))
        self._weight = torch.tensor(float(tokens.numel()), dtype=torch.float64)
        self._bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._engine.tensors().values())
        self._snapshots = Snapshots(0, KEEP, CPU)
        self._waited = 0.0

    def run(self) -> None:
        print(f"{self._bytes / 1e9:.2f} GB of weights and moments, torch {torch.__version__}", flush=True)
        for _ in range(2):
            self._step(None)
        alone = self._median(lambda: self._step(None))
        seconds = self._beside_training()
        copy = self._median(self._copy)
        blocked, beside = seconds["blocked"], seconds["step"]
        print(f"a snapshot             {seconds['whole']:8.3f} s from the beginning to the end, hashed")
        print(f"blocked                {blocked:8.3f} s, {seconds['begin']:.3f} s of it to begin")
        print(f"a plain copy           {copy:8.3f} s")
        print(f"blocked/copy: {blocked / copy:.2f}x (aim: less than 1)")
        print(f"new memory/copy: {seconds['new'] / copy:.2f}x, the first time")
        print(f"a step                 {alone:8.3f} s alone, {beside:.3f} s while a snapshot is copied")
        print(f"step/step: {beside / alone:.2f}x the time")

    def _median(self, action: Callable[[], float]) -> float:
        return statistics.median(action() for _ in range(self._rounds))

    def _step(self, snapshot: Snapshot | None) -> float:
        """Seconds of one step; what it waits for `snapshot` is in `self._waited`."""
        began = time.perf_counter()
        self._engine.forward_backward([self._batch])
        verdict = clip(self._engine.grad_norm(self._weight), 1.0)
        waits = time.perf_counter()
        if snapshot is not None:
            snapshot.wait_copied()
        self._waited = time.perf_counter() - waits
        self._engine.apply(verdict)
        return time.perf_counter() - began

    def _beside_training(self) -> dict[str, float]:
        """Medians by what was measured; `new`: what the first one blocked."""
        measured: dict[str, list[float]] = {"begin": [], "blocked": [], "step": [], "whole": []}
        # The first ones make the memory that the later ones use.
        for step in range(KEEP + 1 + self._rounds):
            began = time.perf_counter()
            snapshot = self._snapshots.begin(step, self._engine.tensors(), {})
            begun = time.perf_counter() - began
            measured["step"].append(begun + self._step(snapshot))
            measured["begin"].append(begun)
            measured["blocked"].append(begun + self._waited)
            while not snapshot.wait(0.0):
                self._step(None)
            measured["whole"].append(snapshot.seconds)
        medians = {name: statistics.median(values[KEEP + 1 :]) for name, values in measured.items()}
        return {**medians, "new": measured["blocked"][0]}

    def _copy(self) -> float:
        copies = getattr(self, "_copies", None)
        if copies is None:
            copies = self._copies = {name: tensor.clone() for name, tensor in self._engine.tensors().items()}
        began = time.perf_counter()
        for name, tensor in self._engine.tensors().items():
            copies[name].copy_(tensor)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
