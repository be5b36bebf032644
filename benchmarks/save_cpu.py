"""What a checkpoint costs: saving beside training, and writing, reading and verifying against `dd`
on the same disk.

    python benchmarks/save_cpu.py            OPT-125M, fp32: 1.5 GB of weights and moments, medians
    of 5 python benchmarks/save_cpu.py --quick    a tiny model: whether it runs

*blocked* is what a save beside training keeps the loop from: collecting the tensors, and the update
that waits for their copy. The plain save is the same code with everybody waiting. Ours and `dd`
take turns with the same file, dropped from the page cache before it is read; a ratio is the median
over rounds. Let nothing else run meanwhile.
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
from saved_model import CPU, SavedModel

from opt_train.checkpoint import manifest
from opt_train.checkpoint.background import BackgroundSave, Staging
from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.durable_file import PIECE_BYTES
from opt_train.checkpoint.load import load
from opt_train.checkpoint.save import save
from opt_train.protocol.facts import SavedFile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", default=None, help="on the disk to measure; default: a temporary one here"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder or ".", prefix="save-benchmark-") as name:
        Benchmark(Path(name), flags.quick, 2 if flags.quick else flags.rounds).run()


class Benchmark:
    def __init__(self, folder: Path, quick: bool, rounds: int) -> None:
        self._folder, self._rounds = folder, rounds
        self._model = SavedModel(quick)

    def run(self) -> None:
        print(
            f"{self._model.bytes / 1e9:.2f} GB of weights and moments, torch {torch.__version__}",
            flush=True,
        )
        for _ in range(2):
            self._model.step()
        alone = self._median(self._model.step)
        in_turn = self._beside_dd()
        plain = statistics.median(in_turn["save"])
        blocked, beside, ended = self._save_beside_training()
        print(f"plain save             {plain:8.3f} s")
        print(
            f"save beside training   {ended:8.3f} s from the beginning to the end, {blocked:.3f} "
            "s of it blocked"
        )
        print(f"blocked/plain: {blocked / plain:.1%} of a plain save (aim: at most 5 %)")
        print(
            f"a step                 {alone:8.3f} s alone, {beside:.3f} s while a checkpoint is "
            "copied and written"
        )
        print(f"step/step: {beside / alone:.2f}x the time")
        copy = self._median(self._model.copy)
        print(f"a plain copy           {copy:8.3f} s")
        print(f"blocked/copy: {blocked / copy:.2f}x")
        for what, ours, theirs in (("write", "save", "dd writes"), ("read", "load", "dd reads")):
            mine, peers = in_turn[ours], in_turn[theirs]
            rate, its = (
                self._model.bytes / statistics.median(seconds) / 1e9 for seconds in (mine, peers)
            )
            ratio = statistics.median(
                its_seconds / seconds for seconds, its_seconds in zip(mine, peers, strict=True)
            )
            print(f"{what}: {rate:.2f} GB/s, {theirs} {its:.2f} GB/s")
            print(f"ours/dd: {ratio:.2f}x of its rate (aim: at least 0.80)")
        print(f"verify: {self._verify():.2f} GB/s on one core (aim: at least 1)")

    def _median(self, action: Callable[[], float]) -> float:
        return statistics.median(action() for _ in range(self._rounds))

    def _new_folder(self) -> Path:
        folder = self._folder / "1.00" / "step-00000001"
        if folder.exists():
            shutil.rmtree(folder)
        os.sync()
        return folder

    def _save(self) -> float:
        folder = self._new_folder()
        began = time.perf_counter()
        self._saved = save(self._model.engine.tensors(), {}, folder)
        return time.perf_counter() - began

    @property
    def _shard(self) -> Path:
        paths = (self._folder / "1.00" / "step-00000001" / file.path for file in self._saved)
        return max(paths, key=lambda path: path.stat().st_size)

    def _beside_dd(self) -> dict[str, list[float]]:
        """Seconds by what was done; in turn, as the disk of a virtual machine has good and bad
        minutes."""
        self._save()
        other, block = self._folder / "dd", f"bs={PIECE_BYTES}"

        def write_by_dd() -> float:
            other.unlink(missing_ok=True)
            os.sync()
            return _dd(f"if={self._shard}", f"of={other}", block, "conv=fsync")

        def read_by_dd() -> float:
            _forget(self._shard)
            return _dd(f"if={self._shard}", "of=/dev/null", block)

        def read() -> float:
            _forget(self._shard)
            began = time.perf_counter()
            load(_State(self._model.engine.tensors()), self._shard.parent)
            return time.perf_counter() - began

        seconds: dict[str, list[float]] = {}
        for pair in (
            {"save": self._save, "dd writes": write_by_dd},
            {"load": read, "dd reads": read_by_dd},
        ):
            for action in (
                pair.values()
            ):  # not counted; and a virtual machine's host has the file at hand from now on
                action()
            seconds |= {name: [] for name in pair}
            for number in range(self._rounds):
                # Whoever goes first in one round goes last in the next.
                for name in list(pair)[:: 1 if number % 2 == 0 else -1]:
                    seconds[name].append(pair[name]())
        return seconds

    def _save_beside_training(self) -> tuple[float, float, float]:
        staging, group = Staging(CPU), dist.new_group(backend="gloo")
        blocked, steps, seconds = [], [], []
        for _ in range(self._rounds + 1):
            folder = self._new_folder()
            began = time.perf_counter()
            saving = BackgroundSave(1, staging, self._model.engine.tensors(), {}, folder, group)
            begun = time.perf_counter() - began
            steps.append(self._model.step(saving))
            blocked.append(begun + self._model.waited)
            while not saving.wait(0.0):
                steps.append(self._model.step())
            self._saved = saving.files()
            seconds.append(saving.seconds)
        # The first save makes the memory that the later ones use.
        return (
            statistics.median(blocked[1:]),
            statistics.median(steps),
            statistics.median(seconds[1:]),
        )

    def _verify(self) -> float:
        """GB/s of a shard that is in memory already."""
        shard = self._shard
        entry = _committed(shard.parent, self._saved).files[shard.name]

        def check() -> float:
            began = time.perf_counter()
            manifest.check_file(shard, entry)
            return time.perf_counter() - began

        check()
        return entry.bytes / self._median(check) / 1e9


class _State:
    """Tensors to restore into; they are the engine's, so there is nothing to put back."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def put_back(self, tensors: object) -> None:
        """See above."""


def _committed(folder: Path, files: tuple[SavedFile, ...]) -> manifest.Manifest:
    made = build_manifest(
        folder, "1.00", 1, {file.path: (file.bytes, file.sha256) for file in files}
    )
    commit_manifest(folder, made)
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
