"""What a checkpoint costs: saving beside training, and writing, reading and verifying against `dd` on the same disk.

    python benchmarks/save_cpu.py            OPT-125M, fp32: 1.5 GB of weights and moments, medians of 5
    python benchmarks/save_cpu.py --quick    a tiny model: whether it runs

*blocked* is what a save beside training keeps the loop from: collecting the tensors, and the update that waits for
their copy. The plain save is the same code with everybody waiting. Files are dropped from the page cache before they
are read. Let nothing else run meanwhile.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from contestants import OPT_125M, QUICK, VALUES, micro_batch

from opt_train.checkpoint import manifest
from opt_train.checkpoint.background import BackgroundSave, Staging
from opt_train.checkpoint.restore import load
from opt_train.checkpoint.save import PIECE_BYTES, save
from opt_train.data.batches import MicroBatch
from opt_train.optim.clip import clip
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.protocol.facts import SavedFile

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: a temporary one here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder or ".", prefix="save-benchmark-") as name:
        Benchmark(Path(name), flags.quick, 2 if flags.quick else flags.rounds).run()


class Benchmark:
    def __init__(self, folder: Path, quick: bool, rounds: int) -> None:
        torch.set_num_threads(2)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        config, length = (QUICK, 64) if quick else (OPT_125M, 512)
        self._folder, self._rounds = folder, rounds
        self._engine = make_engine(
            config, PrecisionConfig(compute="fp32"), ParallelConfig(), Layout(1, 1, 1), CPU, values=VALUES, seed=0
        )
        tokens, targets = micro_batch(config, 1, length)
        self._batch = MicroBatch(tokens, targets, torch.ones(1))
        self._weight = torch.tensor(float(tokens.numel()), dtype=torch.float64)
        self._bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._engine.tensors().values())

    def run(self) -> None:
        print(f"{self._bytes / 1e9:.2f} GB of weights and moments, torch {torch.__version__}", flush=True)
        for _ in range(2):
            self._step(None)
        alone = self._median(lambda: self._step(None))
        plain = self._median(self._save)
        blocked, beside, ended = self._save_beside_training()
        print(f"plain save             {plain:8.3f} s")
        print(f"save beside training   {ended:8.3f} s from the beginning to the end, {blocked:.3f} s of it blocked")
        print(f"blocked/plain: {blocked / plain:.1%} of a plain save (aim: at most 5 %)")
        print(f"a step                 {alone:8.3f} s alone, {beside:.3f} s while a checkpoint is copied and written")
        print(f"step/step: {beside / alone:.2f}x the time")
        copy = self._median(self._copy)
        print(f"a plain copy           {copy:8.3f} s")
        print(f"blocked/copy: {blocked / copy:.2f}x")
        self._against_dd(plain)

    def _median(self, action: Callable[[], float]) -> float:
        return statistics.median(action() for _ in range(self._rounds))

    def _step(self, saving: BackgroundSave | None) -> float:
        """Seconds of one step; what it waits for `saving` is in `self._waited`."""
        began = time.perf_counter()
        self._engine.forward_backward([self._batch])
        verdict = clip(self._engine.grad_norm(self._weight), 1.0)
        waits = time.perf_counter()
        if saving is not None:
            saving.wait_copied()
        self._waited = time.perf_counter() - waits
        self._engine.apply(verdict)
        return time.perf_counter() - began

    def _new_folder(self) -> Path:
        folder = self._folder / "1.00" / "step-00000001"
        if folder.exists():
            shutil.rmtree(folder)
        os.sync()
        return folder

    def _save(self) -> float:
        folder = self._new_folder()
        began = time.perf_counter()
        self._saved = save(self._engine.tensors(), {}, folder)
        return time.perf_counter() - began

    def _save_beside_training(self) -> tuple[float, float, float]:
        staging, group = Staging(CPU), dist.new_group(backend="gloo")
        blocked, steps, seconds = [], [], []
        for _ in range(self._rounds + 1):
            folder = self._new_folder()
            began = time.perf_counter()
            saving = BackgroundSave(1, staging, self._engine.tensors(), {}, folder, group)
            begun = time.perf_counter() - began
            steps.append(self._step(saving))
            blocked.append(begun + self._waited)
            while not saving.wait(0.0):
                steps.append(self._step(None))
            self._saved = saving.files()
            seconds.append(saving.seconds)
        # The first save makes the memory that the later ones use.
        return statistics.median(blocked[1:]), statistics.median(steps), statistics.median(seconds[1:])

    def _copy(self) -> float:
        copies = getattr(self, "_copies", None)
        if copies is None:
            copies = self._copies = {name: tensor.clone() for name, tensor in self._engine.tensors().items()}
        began = time.perf_counter()
        for name, tensor in self._engine.tensors().items():
            copies[name].copy_(tensor)
        return time.perf_counter() - began

    def _against_dd(self, plain: float) -> None:
        folder = self._folder / "1.00" / "step-00000001"
        shard = max((folder / file.path for file in self._saved), key=lambda path: path.stat().st_size)
        size, beside = shard.stat().st_size, self._folder / "dd"
        block = f"bs={PIECE_BYTES}"
        written = self._median(lambda: _dd(f"if={shard}", f"of={beside}", block, "conv=fsync"))
        print(f"write: {self._bytes / plain / 1e9:.2f} GB/s, dd {size / written / 1e9:.2f} GB/s")
        print(f"ours/dd: {written / plain * self._bytes / size:.2f}x of its rate (aim: at least 0.80)")
        read, read_by_dd = [], []
        for _ in range(self._rounds):
            _forget(beside)
            read_by_dd.append(_dd(f"if={beside}", "of=/dev/null", block))
            _forget(shard)
            began = time.perf_counter()
            load(_State(self._engine.tensors()), folder)
            read.append(time.perf_counter() - began)
        ours, theirs = statistics.median(read), statistics.median(read_by_dd)
        print(f"read: {self._bytes / ours / 1e9:.2f} GB/s, dd reads {size / theirs / 1e9:.2f} GB/s")
        print(f"ours/dd: {theirs / ours:.2f}x of its rate (aim: at least 0.80)")
        made = _committed(folder, self._saved)
        entry = made.files[shard.relative_to(folder).as_posix()]

        def check() -> float:
            began = time.perf_counter()
            manifest.check_file(shard, entry)
            return time.perf_counter() - began

        check()
        print(f"verify: {size / self._median(check) / 1e9:.2f} GB/s on one core (aim: at least 1)")


class _State:
    """Tensors to restore into; they are the engine's, so there is nothing to put back."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def put_back(self, tensors: object) -> None:
        """See above."""


def _committed(folder: Path, files: tuple[SavedFile, ...]) -> manifest.Manifest:
    made = manifest.build(folder, "1.00", 1, {file.path: (file.bytes, file.sha256) for file in files})
    manifest.commit(folder, made)
    return made


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _dd(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run(["dd", *arguments, "status=none"], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
