"""``make demo-slurm``: a Slurm of five nodes on this machine, a run on two of them, two failures.

One node loses power; on another the GPU reports an uncontained ECC error (a stand-in for NVIDIA's
library, read by the real binding). Both are swapped for buffer nodes, and the chronicle tells why.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from tests.end_to_end import driving
from tests.slurm import fake_nvml
from tests.slurm.slurm_lab import PACKAGES, SlurmLab, missing

NODES = 4
NAME = "demo-slurm"
RUNS = Path("runs")
OVERRIDES = (
    "experiment=demo",
    "cluster=slurm",
    f"name={NAME}",
    "cluster.buffer_nodes=2",
    "cluster.slurm.supervisor_partition=service",
    "supervisor.orphan_seconds=60",
    "faults.plan=",
    "train.steps=90",
)
PATIENCE_SECONDS = 280.0


def main() -> int:
    """Show it; 0 when both nodes were swapped and the run finished."""
    why = missing()
    if why and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing Slurm: apt-get install {PACKAGES}", flush=True)
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES.split()]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(install, check=False, stdout=subprocess.DEVNULL, env=quiet)
        why = missing()
    if why:
        print(f"make demo-slurm: {why}", file=sys.stderr)
        return 2
    run = RunDirectory((RUNS / NAME).resolve())
    shutil.rmtree(run.path, ignore_errors=True)
    opt_train = str(Path(sys.executable).with_name("opt-train"))
    # Before the cluster: reading the corpus is not what this is to show.
    subprocess.run([opt_train, "prepare", *OVERRIDES], check=True)
    folder = Path(tempfile.mkdtemp(prefix="opt-train-slurm-"))
    try:
        environment = fake_nvml.build(folder / "nvml") | {"OMP_NUM_THREADS": "1"}
        with SlurmLab(folder / "slurm", nodes=NODES, service_nodes=1, gpus=1) as slurm:
            for number in range(1, NODES + 1):
                fake_nvml.set_values(slurm.disk(f"n{number}"), f"n{number}", count=1)
            print(slurm.run("sinfo"), flush=True)
            said = slurm.run(
                *(opt_train, "submit", *OVERRIDES), cwd=Path.cwd(), environment=environment
            )
            print(said, flush=True)
            return show(slurm, run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(slurm: SlurmLab, run: RunDirectory) -> int:
    """Break two nodes, each once the run is well under way, and print the supervisor's lines."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    lines = 0
    faults: list[tuple[str, Callable[[], bool], Callable[[], None]]] = [
        (
            "=== n2 loses power",
            lambda: has_begun(run, 1) and driving.newest_step(run) >= 15,
            lambda: slurm.kill_node("n2"),
        ),
        (
            "=== GPU 0 of n1 reports an uncontained ECC error",
            lambda: has_begun(run, 2) and driving.newest_step(run) >= 40,
            lambda: fake_nvml.set_values(slurm.disk("n1"), "n1", count=1, gpu0_ecc=1),
        ),
    ]
    while time.monotonic() < deadline:
        for log in sorted(run.submit.glob("supervisor-*.log")):
            text = log.read_text(errors="replace").splitlines()
            for line in text[lines:]:
                print(line, flush=True)
            lines = len(text)
        if faults and faults[0][1]():
            sentence, _, do = faults.pop(0)
            print(sentence, flush=True)
            do()
        if not slurm.run("squeue", "--noheader"):  # finished, and the nodes are given back
            break
        time.sleep(0.5)
    kinds = driving.kinds(run)
    swapped = kinds.count("node_promoted")
    print(f"\n{swapped} nodes swapped; read {run.chronicle / 'index.html'}")
    return 0 if swapped == 2 and kinds[-1] == "run_finished" else 1


def has_begun(run: RunDirectory, attempts: int) -> bool:
    return driving.kinds(run).count("training_began") == attempts


if __name__ == "__main__":
    sys.exit(main())
