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
    "recovery.py": (
        r"SIGKILL ours/torchrun: [\d.]+x the time",
        r"start: read [\d.]+  rendezvous [\d.]+  verify [\d.]+  build [\d.]+  load [\d.]+",
    ),
    "supervisor_scale.py": (r"steady training: [\d.]+ % of a core",),
    "loop_overhead.py": (r"loop/step: [\d.]+ % of the step's CPU time",),
    "stability": (
        r"ours: [34] of 4 rescued",
        r"healthy: 0 false acts and 0 false skips in \d+ steps of 3 runs",
    ),
}

SHORT = ("loop_overhead.py", "snapshot_cpu.py", "stability")
"""Quick, and together they import what all share: the others come with the slow tests. That of
sick runs takes longer, and is the only one that shows whether runs are rescued."""
WHOLE = ("recovery.py", "exchange_memory.py", "memory_cpu.py")
"""Take a minute or more for their shortest form."""


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    if name in SHORT:
        return []
    return [pytest.mark.whole if name in WHOLE else pytest.mark.slow]


PARTS = (
    *("__init__.py", "contestants.py", "saved_model.py", "recovery_peer.py", "troubled_rank.py"),
)
"""What benchmarks use, and no one starts."""
PACKAGES = ("stability",)
"""Benchmarks of several files, started as modules."""


def command_of(name: str) -> list[str]:
    if name in PACKAGES:
        return ["-m", f"benchmarks.{name}"]
    return [str(ROOT / "benchmarks" / name)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks_of(name)) for name in RATIOS],
)
def test_a_benchmark_prints_its_ratio(name: str) -> None:
    done = subprocess.run(
        [sys.executable, *command_of(name), "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for ratio in RATIOS[name]:
        assert re.search(ratio, done.stdout), done.stdout


def test_no_benchmark_is_left_out() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    packages = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py")}
    assert packages == set(PACKAGES)
    assert scripts | packages == {*RATIOS, *PARTS}
    makefile = (ROOT / "Makefile").read_text()
    assert all(
        f"$(BIN)/python {' '.join(command_of(n))}".replace(f"{ROOT}/", "") in makefile
        for n in RATIOS
    )
