"""Orders that last, on two real ranks: obeyed at one boundary, and the same bits again from the
ledger."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config.run_config import RunConfig
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.facts import OrderObeyed
from opt_train.protocol.orders import (
    LedgerEntry,
    ScaleEmbeddingGradient,
    ScaleLr,
    SetClip,
    SetLossScale,
    SkipSamples,
)
from tests.train.rig import World, tensors_in, tiny_config

STEPS, EVERY = 40, 10
ORDERS = (
    ScaleLr(1, "it climbs", 0.5),
    SkipSamples(2, "a bad file", 24),
    SetClip(3, "tighter", 0.3),
)


def saved(folder: Path, step: int = STEPS) -> Path:
    return folder / "run" / "checkpoints" / "1.00" / f"step-{step:08d}"


def make_config(folder: Path, steps: int = STEPS, every: int = EVERY) -> RunConfig:
    config = tiny_config(folder, steps=steps)
    return replace(config, checkpoint=CheckpointConfig(every_steps=every, asynchronous=False))


def finished(folder: Path, config: RunConfig, **begin: Any) -> dict[tuple[str, str], str]:
    """The tensors that a run comes to."""
    folder.mkdir()
    with World(folder, config) as world:
        world.begin(**begin)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
    return tensors_in(saved(folder, config.train.steps))


def test_orders_obeyed_while_it_trains_are_those_of_the_ledger_to_the_bit(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    ordered = tmp_path / "ordered"
    ordered.mkdir()
    with World(ordered, config) as world:
        world.begin()
        world.wait_for_step(EVERY)
        for order in ORDERS:
            world.ranks[0].send(order)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        obeyed = {fact.number: fact.step for fact in world.ranks[0].published(OrderObeyed)}
        lines = world.ranks[0].metrics
        guards = json.loads((world.commit(EVERY) / "state.json").read_text())["guards"]
    # What the device sums over the ranks for its guard is what their metrics say.
    assert guards["accepted_losses"] == pytest.approx(guards["losses"], rel=1e-6)
    assert guards["accepted_norms"] == guards["grad_norms"]
    ledger = tuple(LedgerEntry(obeyed[order.number], order) for order in ORDERS)
    assert all(EVERY <= entry.step < STEPS for entry in ledger)
    before, after = obeyed[2], obeyed[2] + 1
    assert lines[after]["samples"] - lines[before]["samples"] == 8 + 24

    expected = tensors_in(saved(ordered))
    assert finished(tmp_path / "from_the_start", config, ledger=ledger) == expected
    restarted = finished(
        tmp_path / "restarted",
        config,
        ledger=ledger,
        order_number=3,
        checkpoint=saved(ordered, EVERY),
    )
    assert restarted == expected, "also where the order came behind the checkpoint"
    undisturbed = finished(tmp_path / "undisturbed", config)
    assert undisturbed != expected


FACTOR, SCALE, FLOOR = 0.25, 2.0**18, 2.0**-3
LAST, BEFORE, BEHIND = 24, 6, 18
"""Steps: of the end, and of the checkpoints before and behind the orders."""
SCALES = (
    ScaleEmbeddingGradient(1, "it drowns the rest", FACTOR),
    SetLossScale(2, "it collapsed", SCALE, FLOOR, window_steps=3),
)
FP16 = PrecisionConfig(compute="fp16", loss_scale_window_steps=8)


def ratio_of(norms: list[float]) -> float:
    """The embedding's norm relative to the rest's, from those of all layers."""
    return norms[0] / math.hypot(*norms[1:])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="fsdp"),
        pytest.param({"parallel": ParallelConfig(tensor=2)}, id="tensor", marks=pytest.mark.slow),
        pytest.param({"precision": FP16}, id="fp16"),
    ],
)
def test_scales_that_were_ordered_are_those_of_the_ledger_to_the_bit(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Also from a checkpoint behind the order, which has the scale but not the floor."""
    config = replace(make_config(tmp_path, LAST, BEFORE), **changes)
    is_scaled = config.precision.compute == "fp16"
    ordered = tmp_path / "ordered"
    ordered.mkdir()
    with World(ordered, config) as world:
        world.begin()
        world.wait_for_step(BEFORE)
        for order in SCALES:
            world.ranks[0].send(order)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        obeyed = {fact.number: fact.step for fact in world.ranks[0].published(OrderObeyed)}
        lines = world.ranks[0].metrics
        for step in (BEFORE, BEHIND):
            world.commit(step)
    ledger = tuple(LedgerEntry(obeyed[order.number], order) for order in SCALES)
    assert all(BEFORE <= entry.step < BEHIND for entry in ledger)

    expected = tensors_in(saved(ordered, LAST))
    assert finished(tmp_path / "from_the_start", config, ledger=ledger) == expected
    for name, step in (("before", BEFORE), ("behind", BEHIND)):
        checkpoint = saved(ordered, step)
        begin: dict[str, Any] = {"ledger": ledger, "order_number": 2, "checkpoint": checkpoint}
        assert finished(tmp_path / name, config, **begin) == expected, name

    scales = {step: line["loss_scale"] for step, line in lines.items()}
    floors = {line["loss_scale_floor"] for line in lines.values()}
    first = obeyed[2] + 1
    if is_scaled:
        assert scales[first - 1] in (4.0, 8.0)
        assert scales[first] == SCALE
        assert scales[first + 1] == SCALE / 2, "it is too high, and falls by itself"
        assert floors == {2.0**-5, FLOOR}
        assert {line["skipped"] for line in lines.values()} == {True, False}
    else:
        assert set(scales.values()) == {1.0}, "what is not scaled has no use for the order"
        assert floors == {None}

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    with World(undisturbed, config) as world:
        world.begin()
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        others = world.ranks[0].metrics
    assert lines[1]["embedding_grad_ratio"] == pytest.approx(
        ratio_of(lines[1]["layer_grad_norms"]), rel=1e-3
    )
    # Up to there both have the same weights, and only the embedding's part of the gradient differs.
    at = obeyed[1] + 1
    if is_scaled and scales[at] == SCALE:
        return
    assert lines[at]["loss"] == pytest.approx(others[at]["loss"], rel=1e-6)
    ratio, norm = others[at]["embedding_grad_ratio"], others[at]["grad_norm"]
    rest = norm / math.hypot(1.0, ratio)
    assert lines[at]["embedding_grad_ratio"] == pytest.approx(FACTOR * ratio, rel=1e-3)
    assert lines[at]["grad_norm"] == pytest.approx(
        math.hypot(FACTOR * ratio * rest, rest), rel=1e-3
    )
