"""Throughput, MFU and memory of training steps on one GPU: sizes, precisions, eager and compiled,
against a plain loop.

    python benchmarks/step_gpu.py                      OPT-125M to 6.7B, 2048 tokens a sequence:
    some ten minutes python benchmarks/step_gpu.py --sizes 1.3b         one size, or several python
    benchmarks/step_gpu.py --sizes 1.3b --profile    and what the time goes to, by kind of kernel
    python benchmarks/step_gpu.py --quick              a tiny model, on a CPU where there is no GPU:
    whether it runs

Each case is a process of its own, so that one which runs out of memory ends alone. It takes the
steps of a lone rank of `opt-train train`: forward, backward, norm, clipping, update, loss scale.
The micro-batch is the largest power of two that `opt-train plan` says fits, with as little
activation checkpointing as that takes; the plan's peak stands beside the measured one. *plain* is a
loop in nanoGPT's manner under bf16 autocast, eager, with torch's fused AdamW and the same
micro-batch, or half of it, and so on, until it fits. MFU is by the formula of docs/metrics.md: what
recomputation adds does not count.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from contestants import QUICK, VALUES, micro_batch, plain

from opt_train.cli.plan import UNREAD
from opt_train.config.compose import compose
from opt_train.config.run_config import RunConfig
from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.sizes import flops_per_token
from opt_train.optim.clip import clip
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.plan.memory import memory_of
from opt_train.plan.throughput import GPUS
from opt_train.train.stats.metrics import OTHER_BOARDS

SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b")
LENGTH = 2048
MOST_SEQUENCES = 32
SHARE_OF_MEMORY = 0.85
"""Of the device's: the rest is its context's, the allocator's gaps, and what the plan leaves
out."""
OUT_OF_MEMORY = 3
KINDS = (
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|sm\d\d_.*mma"),
    ("attention", r"flash|fmha|attention|attn"),
    ("update and norms of gradients", r"multi_tensor|adam|foreach|norm_kernel"),
    ("layer norm", r"layer_?norm"),
    ("loss", r"softmax|nll|cross_entropy|logsumexp"),
    ("collectives", r"nccl"),
    ("copies", r"memcpy|memset|copy|cat"),
)
"""A kernel is of the first kind whose pattern its name has; the others are element by element."""


@dataclass(frozen=True)
class Case:
    size: str
    contestant: str
    """``trainer`` or ``plain``."""
    compute: str
    compile: bool
    batch: int
    """Sequences."""
    mode: str
    """Of activation checkpointing."""
    planned_bytes: int
    profile: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--steps", type=int, default=8, help="timed, after the first ones")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.case:
        print(json.dumps(Measurement(Case(**json.loads(flags.case)), flags.steps).run()))
        return
    if not flags.quick and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --quick tries the benchmark itself on a CPU")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    print(
        "size   case              batch  checkpointing  ms/step   tokens/s    MFU  peak GB  "
        "planned GB",
        flush=True,
    )
    for size in ("quick",) if flags.quick else flags.sizes:
        _compare(size, 1 if flags.quick else flags.steps, flags.profile)


def _compare(size: str, steps: int, profile: bool) -> None:
    """All cases of one size, and their ratios."""
    rates: dict[str, float] = {}
    for compute in ("bf16", "fp16"):
        for compiled in (False,) if size == "quick" else (False, True):
            case = _fitting(size, compute, compiled, profile)
            if case is None:
                print(f"{size:6} {compute}: does not fit", flush=True)
            elif found := _measure(case, steps):
                rates[f"{compute} compiled" if compiled else compute] = found["tokens_per_second"]
    peer = _fitting(size, "bf16", False, False)
    while peer is not None and peer.batch:
        if found := _measure(
            replace(peer, contestant="plain", mode="none", planned_bytes=0), steps
        ):
            rates["plain"] = found["tokens_per_second"]
            break
        peer = replace(peer, batch=peer.batch // 2)
    for ours, theirs in (("bf16", "plain"), ("bf16 compiled", "plain"), ("fp16", "bf16")):
        if ours in rates and theirs in rates:
            print(
                f"{size}: {ours}/{theirs}: {rates[ours] / rates[theirs]:.3f}x throughput",
                flush=True,
            )


def _fitting(size: str, compute: str, compiled: bool, profile: bool) -> Case | None:
    if size == "quick":
        return Case(size, "trainer", compute, compiled, 2, "none", 0, profile)
    room = SHARE_OF_MEMORY * torch.cuda.get_device_properties(0).total_memory
    for mode in ("none", "full"):
        batch = MOST_SEQUENCES
        while batch:
            config = _recipe(size, compute, batch)
            peak = memory_of(config, Layout.of(config.parallel, config.world_size), mode).peak.total
            # Recomputing a block costs a third of a step more; a micro-batch of fewer than 8192
            # tokens starves a GPU.
            if peak <= room and (mode == "full" or batch * LENGTH >= 8192):
                return Case(size, "trainer", compute, compiled, batch, mode, peak, profile)
            batch //= 2
    return None


def _recipe(size: str, compute: str, batch: int) -> RunConfig:
    """The recipe of that size on one rank, with fp32 weights."""
    layout = (
        "cluster.nodes=1",
        "cluster.slots_per_node=1",
        "parallel.tensor=1",
        "parallel.shard=1",
        "parallel.replicate=1",
    )
    precision = (f"precision.compute={compute}", "precision.weights=fp32")
    return compose(
        [
            *UNREAD,
            f"experiment=opt-{size}",
            *layout,
            *precision,
            f"train.micro_batch={batch}",
            f"train.global_batch={batch}",
        ]
    )


def _measure(case: Case, steps: int) -> dict[str, Any] | None:
    """What a process of its own finds; None: it ran out of memory."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    label = f"{case.contestant} {case.compute}{' compiled' if case.compile else ''}"
    if done.returncode == OUT_OF_MEMORY:
        print(f"{case.size:6} {label:17} {case.batch:5}  out of memory", flush=True)
        return None
    if done.returncode:
        sys.exit(f"{label} of {case.size} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    mfu = f"{found['mfu']:6.1%}" if found["mfu"] is not None else "     -"
    print(
        f"{case.size:6} {label:17} {case.batch:5}  {case.mode:13} {found['seconds'] * 1e3:8.1f} "
        f"{found['tokens_per_second']:10.0f} {mfu} {found['peak_bytes'] / 1e9:8.1f} "
        f"{case.planned_bytes / 1e9:11.1f}",
        flush=True,
    )
    for kind, share in found["kinds"].items():
        print(f"         {share:6.1%} {kind}", flush=True)
    return found


class Measurement:
    """One case, in this process."""

    def __init__(self, case: Case, steps: int) -> None:
        self._case, self._steps = case, steps
        self._on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", 0) if self._on_gpu else torch.device("cpu")
        quick = case.size == "quick"
        self._model: ModelConfig = (
            QUICK if quick else replace(_recipe(case.size, case.compute, 1).model, dropout=0.0)
        )
        tokens, targets = micro_batch(self._model, case.batch, 64 if quick else LENGTH)
        self._tokens, self._targets = tokens.to(self._device), targets.to(self._device)
        try:
            self._step = self._plain() if case.contestant == "plain" else self._trainer()
        except torch.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)

    def run(self) -> dict[str, Any]:
        """Timings and memory, as JSON values."""
        try:
            for _ in range(4):
                self._step()
            self._wait()
            began = time.perf_counter()
            for _ in range(self._steps):
                self._step()
            self._wait()
            seconds = (time.perf_counter() - began) / self._steps
        except torch.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)
        rate = self._tokens.numel() / seconds
        name = torch.cuda.get_device_name() if self._on_gpu else ""
        slower = any(board in name for board in OTHER_BOARDS)
        gpu = None if slower else next((gpu for gpu in GPUS.values() if gpu.name in name), None)
        flops = flops_per_token(self._model, self._tokens.shape[1])
        return {
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * flops / gpu.peak_flops if gpu else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if self._on_gpu else 0,
            "kinds": self._kinds(seconds) if self._case.profile and self._on_gpu else {},
        }

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _plain(self) -> Any:
        step = plain(self._model, bf16=True, device=self._device)
        return lambda: step(self._tokens, self._targets)

    def _trainer(self) -> Any:
        backend = "nccl" if self._on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        precision = PrecisionConfig(compute=self._case.compute)
        parallel = ParallelConfig(
            activation_checkpointing=self._case.mode, compile=self._case.compile
        )
        engine = make_engine(
            EngineSpec(
                model=self._model,
                precision=precision,
                parallel=parallel,
                layout=Layout(1, 1, 1),
                device=self._device,
                values=VALUES,
                seed=0,
            )
        )
        loss_scale = LossScale(policy_of(precision), self._device)
        batch = [MicroBatch(self._tokens, self._targets, torch.ones(len(self._tokens)))]
        count = torch.tensor(float(self._tokens.numel()), dtype=torch.float64, device=self._device)

        def step() -> None:
            engine.forward_backward(batch, loss_scale.scale)
            decision = clip(engine.grad_norm(count, loss_scale.scale), 1.0)
            engine.apply(decision)
            loss_scale.update(decision.skip)

        return step

    def _kinds(self, seconds: float) -> dict[str, float]:
        """Shares of a step's time by kind of kernel, and of the time in which there was none."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(2):
                self._step()
            self._wait()
        microseconds: dict[str, float] = defaultdict(float)
        for event in profile.key_averages():
            name = event.key.lower()
            kind = next(
                (kind for kind, pattern in KINDS if re.search(pattern, name)), "element by element"
            )
            microseconds[kind] += event.self_device_time_total / 2
        shares = {
            kind: taken / 1e6 / seconds
            for kind, taken in sorted(microseconds.items(), key=lambda one: -one[1])
        }
        return {**shares, "no kernel at all": max(0.0, 1.0 - sum(shares.values()))}


if __name__ == "__main__":
    main()
