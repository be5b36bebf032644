"""What counts a rehearsal's memory must count as torch's own tracker does, where that one can."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from opt_train.config.run_config import RunConfig
from tests.plan.presets import recipe, with_layers
from tests.train.rig import environment

SCRIPT = Path(__file__).with_name("torchs_tracker.py")

CONFIGS = [
    with_layers(
        recipe(size, f"parallel.activation_checkpointing={mode}", f"train.micro_batch={rows}"), 3
    )
    for size, rows in (("125m", 32), ("6.7b", 8), ("175b", 8))
    for mode in ("none", "selective", "full")
]
CONFIGS.append(with_layers(recipe("125m", "parallel.compile=false"), 3))


@pytest.mark.parametrize(
    "configs",
    [
        pytest.param(CONFIGS[1::4], id="some", marks=pytest.mark.slow),
        pytest.param(CONFIGS, id="all", marks=pytest.mark.whole),
    ],
)
def test_the_peak_is_that_of_torchs_tracker(configs: list[RunConfig]) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps([asdict(config) for config in configs]),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(peaks) == len(configs)
    for config, peak in zip(configs, peaks, strict=True):
        assert peak["ours"] == pytest.approx(peak["torch"], rel=0.001), config.model.name
