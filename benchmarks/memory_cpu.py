"""Peak memory of training steps on a CPU: ours against transformers' OPT, each in a process of its
own.

    python benchmarks/memory_cpu.py            OPT-125M, fp32, 8 x 512 tokens: logits are 0.8 GB a
    copy python benchmarks/memory_cpu.py --quick    a tiny model: whether it runs

Measured is the most that the process ever had resident (VmHWM of /proc/self/status) over two steps,
so with the optimizer's state, less what it had before there was a model. Below 1, ours needs less.
Ours is what a lone rank of `opt-train train` does. Both give back what they free (`GIVE_BACK`):
glibc would keep blocks of up to 32 MB for later, and what is resident would tell how well they
happen to fit together.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from contestants import CONTESTANTS, OPT_125M, QUICK, micro_batch

AIM = 0.60
COMPARED = ("trainer", "transformers")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--contestant", choices=COMPARED, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    config, sequence_length = (QUICK, 64) if flags.quick else (OPT_125M, 512)
    if flags.contestant:
        torch.set_num_threads(flags.threads)
        if flags.contestant == "transformers":
            # Code is not what is compared.
            import transformers.models.opt.modeling_opt  # noqa: F401, PLC0415
        before = resident("VmRSS")
        step = CONTESTANTS[flags.contestant](config, flags.bf16)
        tokens, targets = micro_batch(config, flags.batch, sequence_length)
        for _ in range(STEPS):
            step(tokens, targets)
        print(resident("VmHWM") - before)
        return

    what = (
        f"{config.name}, {'bf16' if flags.bf16 else 'fp32'}, {flags.batch} x {sequence_length} "
        "tokens"
    )
    print(f"{what}, {STEPS} steps, torch {torch.__version__}", flush=True)
    peak_bytes = {}
    for name in COMPARED:
        command = [sys.executable, __file__, *sys.argv[1:], f"--contestant={name}"]
        environment = os.environ | GIVE_BACK
        answer = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        ).stdout
        peak_bytes[name] = int(answer.split()[-1])
        print(f"{name:13} {peak_bytes[name] / 1e9:7.3f} GB at most", flush=True)
    print(
        f"ours/transformers: {peak_bytes['trainer'] / peak_bytes['transformers']:.3f}x memory "
        f"(aim {AIM:.2f}x)"
    )


def resident(key: str) -> int:
    """Bytes of this process that lie in memory: now (`VmRSS`) or at most so far (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()
