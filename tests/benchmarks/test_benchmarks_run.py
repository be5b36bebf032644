"""A benchmark that nobody runs rots: each one's `--quick` form must still print its ratio."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RATIOS = {
    "step_cpu.py": (r"ours/transformers: [\d.]+x throughput", r"ours/plain: [\d.]+x throughput"),
    "memory_cpu.py": (r"ours/transformers: [\d.]+x memory",),
    "exchange_memory.py": (
        r"export/largest tensor: [\d.]+x memory",
        r"import/transformers: [\d.]+x memory",
    ),
    "save_cpu.py": (r"blocked/plain: [\d.]+% of a plain save", r"ours/dd: [\d.]+x of its rate"),
    "snapshot_cpu.py": (r"blocked/copy: [\d.]+x", r"step/step: [\d.]+x the time"),
    "step_gpu.py": (
        r"quick: bf16/plain: [\d.]+x throughput",
        r"quick: fp16/bf16: [\d.]+x throughput",
    ),
    "loop_overhead.py": (r"loop/step: [\d.]+ % of the step's CPU time",),
}

SHORT = ("loop_overhead.py", "snapshot_cpu.py")
"""Quick, and together they import what all share: the others come with the slow tests."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else pytest.mark.slow) for name in RATIOS],
)
def test_a_benchmark_prints_its_ratio(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--quick"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for ratio in RATIOS[name]:
        assert re.search(ratio, done.stdout), done.stdout


def test_no_benchmark_is_left_out() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*RATIOS, "contestants.py", "saved_model.py"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"benchmarks/{name}" in makefile for name in RATIOS)
