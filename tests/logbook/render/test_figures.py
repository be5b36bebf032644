"""A figure shows each attempt, each gap and each time without training, whatever the numbers."""

import math
import re
from pathlib import Path

from opt_logbook.record.events import (
    CheckpointCommitted,
    FailureSeen,
    IncidentClosed,
    JournalStalled,
    ValidationMeasured,
)
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.plots import ALARM, ATTEMPT_COLOURS
from opt_logbook.render.render import render

from tests.logbook.chronicle_reading import (
    figures_of,
    half_a_run,
)
from tests.logbook.demo_run import NODES, DemoRun, metrics_line


def test_a_loss_that_was_no_number_breaks_the_curve(tmp_path: Path) -> None:
    pieces = []
    for name, loss in (("whole", 4.0), ("broken", math.nan)):
        demo = DemoRun(tmp_path / name)
        demo.create()
        demo.start("1.00", 0, NODES, (), reason="the run begins")
        for step in range(2, 40):
            line = metrics_line(step, demo.now + step)
            demo.metrics.append("1.00", {**line, "loss": loss if step == 20 else line["loss"]})
        svg = figures_of(demo.run)["wall_clock"]
        curves = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {ATTEMPT_COLOURS[0]}', svg)
        pieces.append(max(curve.count("M ") for curve in curves))
    assert pieces == [1, 2]


def test_each_attempt_has_its_curve_and_each_time_without_training_its_shade(
    demo: RunDirectory,
) -> None:
    figures = figures_of(demo)
    for name in ("steps", "wall_clock"):
        for colour in ATTEMPT_COLOURS[:3]:
            curves = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', figures[name])
            assert max(curve.count("L ") for curve in curves) > 20, f"{name}, {colour}"
        assert ATTEMPT_COLOURS[3] not in figures[name]
    shades = re.findall(rf"fill: {ALARM}; opacity: 0.16", figures["wall_clock"])
    assert len(shades) == 2


def test_numbers_that_no_axis_and_no_calendar_has_do_not_stop_the_chronicle(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    huge = 10**400
    demo.append(FailureSeen(1, 1, "node-1", 0, "rank 0 is gone"), huge)
    demo.append(IncidentClosed(1, "recovered", huge, math.inf, math.nan), huge)
    demo.append(ValidationMeasured("validation", 4.0, 50.0, huge), huge)
    demo.append(CheckpointCommitted("checkpoints/x", "", huge, 1, math.inf, healthy=True), huge)
    demo.append(JournalStalled(math.nan))
    with demo.run.metrics_of("1.00").open("a") as file:
        file.write(f'{{"step":61,"loss":{huge},"time":1e300,"step_seconds":1e308}}\n')
        file.write(f'{{"step":{huge},"loss":4.0,"tokens":{huge}}}\n')
    assert len(render(demo.run).figures) == 3
