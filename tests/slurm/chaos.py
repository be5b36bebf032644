"""``make chaos``: a run on a real Slurm of four nodes and two spares that everything happens to.

Fourteen faults, each once, in an order, to victims and after pauses that the seed chooses. What is
broken is healed when the run has recovered, so that there are always four good nodes to be had:
every step is done in the end, the weights are those of a run that nothing happened to, bit for bit,
and the journal names each fault's cause.

A second plan, without healing, loses two nodes for good and has a spare for one: it ends on three
nodes, with the same samples, and losses that differ by no more than rounding.

    python -m tests.slurm.chaos --seed 7 [--plan healing]
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opt_logbook.record.events import Entry
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm import fake_nvml
from tests.slurm.chaos_faults import (
    EVERY_STEPS,
    FAULTS,
    NODES,
    SLURM_PATIENCE_SECONDS,
    Chaos,
    Fault,
    bring_the_time_limit_near,
)
from tests.slurm.site import Site
from tests.slurm.slurm_lab import SlurmLab, missing
from tests.train.rig import tensors_in

ROOT = Path(__file__).resolve().parents[2]
SPARES, SERVICE_NODES = 2, 2
STEPS, PAUSE_SECONDS = 350, 0.4
SHARED_MEGABYTES = 256
RUN = (
    *(f"cluster.nodes={NODES}", f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY_STEPS}"),
    *("train.micro_batch=2", "supervisor.orphan_seconds=120"),
    # Timeouts short enough to be waited for, and learned ones too.
    *("supervisor.step_seconds=20", "supervisor.minimum_seconds=6"),
    *("burn_in.matmul_size=128", "burn_in.matmul_seconds=0.1", "burn_in.pair_rounds=0"),
    *("burn_in.host_memory_bytes=1000000", "burn_in.file_bytes=1000000"),
    *("burn_in.pair_bytes=1000000", "burn_in.majority_share=0"),
)
ON_SLURM = (
    *(f"cluster.buffer_nodes={SPARES}", "cluster.rank_module=tests.slurm.chaotic_rank"),
    *("cluster.slurm.stop_before_seconds=100", "burn_in.return_seconds=5"),
)


UNHEALED = ("a node loses power", "rank 0's node loses power", "a rank is killed")


def plan(seed: int) -> list[Fault]:
    """The faults in the order of the seed."""
    chosen = random.Random(seed).sample(FAULTS, len(FAULTS))
    # Without an accounting database Slurm changes nothing any more of a job that has lost a node
    # (ESLURM_JOB_SETTING_DB_INX): its time limit comes near before that.
    limit = next(fault for fault in chosen if fault.inject is bring_the_time_limit_near)
    first = next(fault for fault in chosen if fault.takes_a_node)
    if chosen.index(limit) > chosen.index(first):
        chosen.remove(limit)
        chosen.insert(chosen.index(first), limit)
    return chosen


@contextlib.contextmanager
def shared_file_system(folder: Path) -> Iterator[Path]:
    """A file system of its own, which can be full and can stall."""
    image, mounted = folder / "image", folder / "work"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(SHARED_MEGABYTES << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


@contextlib.contextmanager
def started(
    folder: Path, seed: int, nodes: int = NODES + SPARES, *overrides: str
) -> Iterator[Chaos]:
    """The lab, and the run on it, submitted."""
    orders = folder / "orders"
    orders.mkdir()
    environment = fake_nvml.build(folder / "nvml") | {
        "OMP_NUM_THREADS": "1",
        "CHAOS_FOLDER": str(orders),
        "CHAOS_PAUSE": str(PAUSE_SECONDS),
        # Of the ranks too, whose module is one of the tests.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    with (
        shared_file_system(folder) as shared,
        SlurmLab(
            folder / "slurm",
            nodes=nodes,
            service_nodes=SERVICE_NODES,
            gpus=1,
            slurmd_timeout=SLURM_PATIENCE_SECONDS,
        ) as slurm,
    ):
        for number in range(1, nodes + 1):
            fake_nvml.set_values(slurm.disk(f"n{number}"), f"n{number}", count=1)
        site = Site(slurm, shared, environment)
        site.submit(*RUN, *ON_SLURM, *overrides)
        yield Chaos(site, orders, shared, seed)


def break_all(
    chaos: Chaos, faults: list[Fault], say: Callable[[str], None], *, heal: bool = True
) -> None:
    """Inject one fault after the other, each when the run has recovered from the last."""
    for fault in faults:
        chaos.wait_for_training()
        if heal and fault.takes_a_node:
            chaos.wait(lambda: bool(chaos.spares()), "a node that was healed and stands by again")
        began, step = time.monotonic(), chaos.step()
        say(f"step {step}: {fault.name}")
        expected = fault.inject(chaos)
        chaos.wait(expected.holds, f"after {fault.name!r}: {expected.what}")
        if heal:
            expected.heal()
        say(f"  {expected.what}, {time.monotonic() - began:.1f} s")
        assert "run_finished" not in driving.kinds(chaos.run), "the plan took longer than the run"


def last_save(run: RunDirectory) -> Entry:
    return driving.of_kind(run, "checkpoint_committed")[-1]


def lines(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """The metrics of each step, of the newest attempt that did it."""
    return {step: line for steps in driving.metrics(run).values() for step, line in steps.items()}


def undisturbed(folder: Path, *overrides: str) -> RunDirectory:
    """The same run where nothing happens to it, on this machine."""
    process = driving.start(folder, *RUN, "cluster.buffer_nodes=0", *overrides)
    try:
        code = driving.finish(process, folder, 600)
    finally:
        driving.end(process, folder)
    assert code == 0, driving.tail(folder)
    return driving.run_directory(folder)


def finish(chaos: Chaos, steps: int) -> None:
    (chaos.orders / "fast").touch()
    chaos.wait(lambda: driving.kinds(chaos.run)[-1] == "run_finished", "the end", 400)
    # Of a node that lost power Slurm asks for minutes whether its job has ended.
    chaos.wait(lambda: chaos.site.jobs() == [], "the end of the allocation", 400)
    assert verify(chaos.run) == []
    story = (chaos.run.chronicle / "chronicle.md").read_text()
    assert all(node in story for node in chaos.broken), "the chronicle leaves out a node"
    assert last_save(chaos.run).step == steps
    assert set(lines(chaos.run)) == set(range(1, steps + 1)), "steps are missing"


def run_plan(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Raises AssertionError where the run did not live through it."""
    with started(folder, seed) as chaos:
        break_all(chaos, plan(seed), say)
        finish(chaos, STEPS)
        found = tensors_in(chaos.run.path / last_save(chaos.run).event.path)
        attempts = len(chaos.entries("attempt_started"))
        say(f"{attempts} attempts, {len(chaos.entries('incident_diagnosed'))} incidents")
    say("and now undisturbed")
    other = undisturbed(folder / "undisturbed")
    assert found == tensors_in(other.path / last_save(other).event.path), "other weights"
    say("every step done, the same weights bit for bit")


def run_without_healing(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Likewise."""
    # Each rank draws what it drops by itself, so that other ranks drop something else.
    same = ("train.steps=200", "model.dropout=0")
    fewer = ("cluster.buffer_nodes=1", "cluster.min_nodes=3", *same)
    faults = [f for f in plan(seed) if f.name in UNHEALED]
    with started(folder, seed, NODES + 1, *fewer) as chaos:
        break_all(chaos, faults, say, heal=False)
        finish(chaos, 200)
        assert len(chaos.nodes()) == NODES - 1
        found = lines(chaos.run)
    say("and now undisturbed")
    other = lines(undisturbed(folder / "undisturbed", *same))
    assert [found[k]["samples"] for k in other] == [other[k]["samples"] for k in other]
    farthest = max(abs(found[k]["loss"] / other[k]["loss"] - 1) for k in other)
    assert farthest < 5e-4, f"losses differ by {farthest:.1e}"
    say(f"every step done on fewer nodes, losses at most {farthest:.1e} from the undisturbed ones")


PLANS: dict[str, Callable[[Path, int, Callable[[str], None]], None]] = {
    "healing": run_plan,
    "without-healing": run_without_healing,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", choices=list(PLANS), help="one of them; else both")
    asked = parser.parse_args()
    why = missing()
    if why:
        print(f"make chaos: {why}", file=sys.stderr)
        return 2
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    for name in [asked.plan] if asked.plan else PLANS:
        say(f"the plan {name}, seed {asked.seed}")
        folder = Path(tempfile.mkdtemp(prefix="opt-train-chaos-"))
        try:
            PLANS[name](folder, asked.seed, say)
        except AssertionError as error:
            print(f"{name}, seed {asked.seed}: {error}", file=sys.stderr)
            print(f"kept: {folder}, whose file image is what the run saw", file=sys.stderr)
            return 1
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
