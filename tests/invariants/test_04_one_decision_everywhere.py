"""Overflow, skip, stop and orders are decided once: every rank records the same sequence."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config.run_config import RunConfig, to_json
from opt_train.optim.schedule import learning_rate
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.exits import RANK_UNSTABLE, STOPPED
from tests.train.rig import ROOT, World, run_script, tiny_config


@pytest.mark.parametrize("steps", [600, pytest.param(2500, marks=pytest.mark.whole)])
def test_many_steps_and_every_rank_records_the_same(tmp_path: Path, steps: int) -> None:
    program = ROOT / "tests/train/step_stats_ranks.py"
    records = run_script(program, 4, str(steps), folder=tmp_path)
    assert all(record == records[0] for record in records[1:])
    stats = [entry for entry in records[0] if entry[0] == "stats"]
    orders = [entry for entry in records[0] if entry[0] == "order"]
    assert [entry[1] for entry in stats] == list(range(len(stats)))
    assert len(stats) > steps - 200
    # Every order was obeyed once and in turn, at boundaries all over the run.
    assert [entry[2] for entry in orders] == list(range(1, 41))
    assert len({entry[1] for entry in orders}) > 20
    assert Counter(entry[2] for entry in stats)["skip"] > 40
    assert {entry[3] for entry in stats if entry[2] == "skip"} == {"inf"}
    assert stats[-1][2] == "stop"
    assert records[0][-1][0] == "stop"


def run_training(folder: Path, config: RunConfig, **given: Any) -> list[dict[str, Any]]:
    path = folder / "config.json"
    path.write_text(to_json(config))
    (folder / "run").mkdir()
    specification = folder / "specification.json"
    specification.write_text(
        json.dumps({"config": str(path), "run_directory": str(folder / "run")} | given)
    )
    return run_script(ROOT / "tests/train/training_rank.py", 4, str(specification), folder=folder)


@pytest.mark.parametrize(
    ("precision", "scales"),
    [
        (PrecisionConfig(compute="fp32"), [1.0] * 6),
        (
            PrecisionConfig(compute="fp16", weights="fp16", loss_scale_window_steps=2),
            [4.0, 4.0, 8.0, 4.0, 4.0, 8.0],
        ),
    ],
    ids=["fp32", "fp16"],
)
def test_overflow_on_one_rank_skips_on_all(
    tmp_path: Path, precision: PrecisionConfig, scales: list[float]
) -> None:
    # Ranks 0 and 2 hold copies of one half of the weights, 1 and 3 of the other.
    config = replace(
        tiny_config(tmp_path, steps=6), parallel=ParallelConfig(replicate=2), precision=precision
    )
    answers = run_training(tmp_path, config, poison=[3, 2])
    assert all(answer["words"] == answers[0]["words"] for answer in answers)
    assert answers[0]["words"]["updates"] == 5
    assert answers[0]["words"]["losses"][2] == "inf"
    assert all(answer["optimizer_steps"] == [5.0] for answer in answers)
    weights = [answer["weights"] for answer in answers]
    assert weights[:2] == weights[2:]
    assert weights[0] != weights[1]
    lines = [fact["line"] for fact in answers[0]["facts"] if fact["kind"] == "metrics"]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    assert [line["overflow"] for line in lines] == [line["skipped"] for line in lines]
    assert [line["updates"] for line in lines] == [1, 2, 2, 3, 4, 5]
    # What each step was taken with: the overflow in step 3 is paid for in step 4.
    assert [line["loss_scale"] for line in lines] == scales
    # The step after the skipped one trains from the same weights, on the next batch.
    assert lines[3]["loss"] == pytest.approx(lines[1]["loss"], abs=0.5)


def test_orders_and_a_stop_signal_reach_all_ranks_at_one_boundary(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path, steps=4000), checkpoint=CheckpointConfig(every_steps=0))
    answers = run_training(tmp_path, config, terminate=[2, 40], orders=[[5, 1], [15, 2], [15, 3]])
    assert all(answer["state"] == answers[0]["state"] for answer in answers)
    leavings = [answer["facts"][-1] for answer in answers]
    assert {(leaving["code"], leaving["step"]) for leaving in leavings} == {
        (STOPPED, leavings[0]["step"])
    }
    assert "SIGTERM" in leavings[2]["reason"]
    saves = [
        [fact["step"] for fact in answer["facts"] if fact["kind"] == "shards_saved"]
        for answer in answers
    ]
    assert all(each == saves[0] for each in saves)
    # The state was saved where it stopped; what is seen in step n is obeyed at a boundary right
    # behind it.
    assert saves[0] == [42]
    assert leavings[0]["step"] == 42
    # Each order halves the learning rate of the batches behind its boundary.
    lines = [fact["line"] for fact in answers[0]["facts"] if fact["kind"] == "metrics"]
    for line in lines:
        factor = 0.5 if 7 < line["step"] <= 17 else 0.125 if line["step"] > 17 else 1.0
        assert line["lr"] == factor * learning_rate(config.optim, line["step"] - 1, 4000)
    assert len(lines) == 42
    assert [entry["step"] for entry in answers[2]["state"]["ledger"]] == [7, 17, 17]
    obeyed = [
        (fact["number"], fact["step"])
        for fact in answers[0]["facts"]
        if fact["kind"] == "order_obeyed"
    ]
    assert obeyed == [(1, 7), (2, 17), (3, 17)]


def test_run_that_stays_non_finite_leaves_with_its_own_code(tmp_path: Path) -> None:
    """Skipping for ever would look like training to everybody who only watches that steps go by."""
    config = tiny_config(tmp_path, steps=30, max_nonfinite_steps=3)
    config = replace(config, optim=replace(config.optim, lr=1e30, warmup_steps=0))
    with World(tmp_path, config) as world:
        world.begin()
        leavings = world.finish()
        assert {(leaving.code, leaving.cause) for leaving in leavings} == {
            (RANK_UNSTABLE, "loss_nan")
        }
        lines = world.ranks[0].metrics
        assert [line["skipped"] for line in lines.values()][-3:] == [True] * 3


def test_overflow_counts_against_the_run_at_the_loss_scales_floor_alone(tmp_path: Path) -> None:
    """Above it, overflows are how the scale finds its place: leaving then would end every run that
    starts high."""
    config = tiny_config(tmp_path, steps=30, max_nonfinite_steps=3)
    config = replace(config, optim=replace(config.optim, lr=1e30, warmup_steps=0))
    config = replace(
        config,
        precision=PrecisionConfig(compute="fp16", loss_scale_initial=8.0, loss_scale_floor=1.0),
    )
    with World(tmp_path, config) as world:
        world.begin()
        leavings = world.finish()
        assert {(leaving.code, leaving.cause) for leaving in leavings} == {
            (RANK_UNSTABLE, "loss_scale_floor")
        }
        assert "3 steps in a row" in leavings[0].reason
        assert "its floor of 1" in leavings[0].reason
        lines = list(world.ranks[0].metrics.values())
        first = next(number for number, line in enumerate(lines) if line["skipped"])
        assert [line["loss_scale"] for line in lines[first:]][:6] == [8.0, 4.0, 2.0, 1.0, 1.0, 1.0]
        assert all(line["skipped"] and line["overflow"] for line in lines[first:])
