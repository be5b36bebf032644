"""Peak memory of `export` and `import`: against the largest tensor, and against transformers
loading and saving.

    python benchmarks/exchange_memory.py            OPT-125M, fp32: 0.5 GB of weights, the largest
    tensor 0.15 GB python benchmarks/exchange_memory.py --quick    a tiny model: whether it runs

Each is a process of its own. Measured is the most that it had resident (VmRSS, read some hundred
times a second), less what it had before it opened a file. Below 1, ours needs less. What
transformers loads are pages of a file that it maps, which the system may take back; of its own it
then has little. So both are printed, and compared is what is resident.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from contestants import OPT_125M, QUICK

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.save import save
from opt_train.checkpoint.tensors import tensors_of
from opt_train.exchange.stored_tensor import shapes_of
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise

AIM = 1.00
"""Of the largest tensor."""

SAMPLE_SECONDS = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--contestant",
        choices=("prepare", "export", "import", "transformers"),
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    config = QUICK if flags.quick else OPT_125M
    if flags.contestant:
        print(*CONTESTANTS[flags.contestant](config, flags.folder))
        return

    largest = max(4 * torch.Size(shape).numel() for _, shape in shapes_of(config))
    print(
        f"{config.name}, fp32, largest tensor {largest / 1e6:.1f} MB, torch {torch.__version__}",
        flush=True,
    )
    peak_bytes = {}
    with tempfile.TemporaryDirectory(prefix="exchange-memory-") as folder:
        for name in CONTESTANTS:
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                f"--contestant={name}",
                f"--folder={folder}",
            ]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if name == "prepare":
                continue
            peak_bytes[name], own = (int(word) for word in answer.split()[-2:])
            print(
                f"{name:13} {peak_bytes[name] / 1e6:9.1f} MB at most, {own / 1e6:9.1f} MB its own",
                flush=True,
            )
    for name in ("export", "import"):
        print(f"{name}/largest tensor: {peak_bytes[name] / largest:.3f}x memory (aim {AIM:.2f}x)")
    for name in ("export", "import"):
        print(f"{name}/transformers: {peak_bytes[name] / peak_bytes['transformers']:.3f}x memory")


def prepare(config, folder: Path) -> tuple[int, int]:
    """A checkpoint with AdamW's state, as training saves it."""
    model = OPT(config)
    initialise(model, config, seed=0)
    files = save(
        tensors_of(model, torch.optim.AdamW(model.parameters())), {"step": 0}, folder / "checkpoint"
    )
    named = {file.path: (file.bytes, file.sha256) for file in files}
    commit_manifest(folder / "checkpoint", build_manifest(folder / "checkpoint", "1.00", 0, named))
    return 0, 0


def export(config, folder: Path) -> tuple[int, int]:
    from opt_train.exchange.exporting import export  # noqa: PLC0415

    with Watch() as watch:
        export(config, folder / "checkpoint", None, folder / "hf")
    return watch.most["VmRSS"], watch.most["RssAnon"]


def bring_in(config, folder: Path) -> tuple[int, int]:
    from opt_train.exchange.importing import bring_in  # noqa: PLC0415
    from opt_train.exchange.sources import open_source  # noqa: PLC0415

    with Watch() as watch:
        bring_in(open_source(folder / "hf"), folder / "imported")
    return watch.most["VmRSS"], watch.most["RssAnon"]


def transformers(config, folder: Path) -> tuple[int, int]:
    """The usual way from one folder to another."""
    from transformers import OPTForCausalLM  # noqa: PLC0415

    with Watch() as watch:
        OPTForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).save_pretrained(
            folder / "again"
        )
    return watch.most["VmRSS"], watch.most["RssAnon"]


class Watch:
    """The most memory that this process had meanwhile, in bytes, less what it began with: resident,
    and its own."""

    def __enter__(self) -> "Watch":
        self._before = memory()
        self.most = dict.fromkeys(self._before, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.is_set():
            for key, value in memory().items():
                self.most[key] = max(self.most[key], value - self._before[key])
            time.sleep(SAMPLE_SECONDS)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def memory() -> dict[str, int]:
    """Bytes of this process in memory: all, and those that no file backs."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:")
    }


CONTESTANTS = {
    "prepare": prepare,
    "export": export,
    "import": bring_in,
    "transformers": transformers,
}


if __name__ == "__main__":
    main()
