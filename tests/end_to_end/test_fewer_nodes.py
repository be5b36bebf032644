"""A run that loses a node for good and has no other goes on with the same samples."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.end_to_end import driving

STEPS = 40


@pytest.mark.whole
def test_losses_on_fewer_nodes_are_those_of_all_within_rounding(tmp_path: Path) -> None:
    overrides = ("cluster.nodes=3", "cluster.buffer_nodes=0", "cluster.min_nodes=2")
    overrides += (f"train.steps={STEPS}", "train.micro_batch=2", "model.dropout=0")
    whole = driving.start(tmp_path / "whole", *overrides)
    assert driving.finish(whole, tmp_path / "whole", 150) == 0

    folder = tmp_path / "fewer"
    process = driving.start(folder, *overrides)
    run = driving.run_directory(folder)
    driving.wait_for(lambda: driving.newest_step(run) >= 14, 120, process, folder)
    os.kill(json.loads((run.nodes / "node-2" / "agent.json").read_text())["pid"], signal.SIGKILL)
    assert driving.finish(process, folder, 150) == 0

    started = [entry.event for entry in driving.of_kind(run, "attempt_started")]
    assert [s.nodes for s in started] == [("node-1", "node-2", "node-3"), ("node-1", "node-3")]
    expected = driving.metrics(driving.run_directory(tmp_path / "whole"))["1.00"]
    fewer = driving.metrics(run)["1.01"]
    assert max(fewer) == STEPS
    for step, line in fewer.items():
        assert line["samples"] == expected[step]["samples"]
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=2e-4), step
