"""Throughput of one training step on a CPU: ours against transformers' OPT and a plain loop, in
turn in one process.

*ours* is the model with its loss and optimizer, *trainer* what a lone rank does with it: its
engine, and clipping.

    python benchmarks/step_cpu.py            OPT-125M, fp32, 2 threads, 1 x 512 tokens, 7 rounds
    python benchmarks/step_cpu.py --bf16
    python benchmarks/step_cpu.py --quick    a tiny model: whether it runs

A round lets each contestant take one step, so that whatever else the machine does meets all alike.
The ratio is the median over rounds of the peer's seconds divided by ours in the same round: above
1, ours is faster.
"""

import argparse
import statistics
import time

import torch
from contestants import CONTESTANTS, OPT_125M, QUICK, micro_batch

AIM = 0.98
OURS = ("ours", "trainer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    config, sequence_length, rounds = (
        (QUICK, 64, 2) if flags.quick else (OPT_125M, 512, flags.rounds)
    )
    tokens, targets = micro_batch(config, flags.batch, sequence_length)
    steps = {name: make(config, flags.bf16) for name, make in CONTESTANTS.items()}
    for name, step in steps.items():
        losses = [step(tokens, targets) for _ in range(2)]
        print(f"{name:13} loss {losses[0]:.4f}, then {losses[1]:.4f}", flush=True)

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        # Whoever goes first in one round goes last in the next: none is always behind the same
        # neighbour.
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            steps[name](tokens, targets)
            seconds[name].append(time.perf_counter() - began)

    what = (
        f"{config.name}, {'bf16' if flags.bf16 else 'fp32'}, {flags.batch} x {sequence_length} "
        "tokens"
    )
    print(f"{what}, {flags.threads} threads, {rounds} rounds, torch {torch.__version__}")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:13} {median:8.3f} s a step, {tokens.numel() / median:8.0f} tokens/s")
    for own in OURS:
        for peer in (name for name in steps if name not in OURS):
            ratio = statistics.median(
                theirs / mine for theirs, mine in zip(seconds[peer], seconds[own], strict=True)
            )
            print(f"{own}/{peer}: {ratio:.3f}x throughput (aim {AIM:.2f}x)")


if __name__ == "__main__":
    main()
