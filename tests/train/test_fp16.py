"""fp16 in the trainer: it follows fp32, its scale grows, and a resumed run is the uninterrupted
one, to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.checkpoint.manifest import Manifest
from opt_train.config.run_config import RunConfig
from opt_train.optim.adamw import make_optimizer
from opt_train.optim.in_force import in_force
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.config import PrecisionConfig
from opt_train.train.resume import (
    CannotStart,
    load_loss_scale,
    report_in_force,
    saved_loss_scale,
)
from opt_train.train.state import TrainState
from tests.train.rig import World, tensors_in, tiny_config

STEPS, HALF = 24, 14
FP16 = PrecisionConfig(compute="fp16", loss_scale_window_steps=4)
EFFICIENT = replace(FP16, weights="fp16")


def small(folder: Path, precision: PrecisionConfig) -> RunConfig:
    folder.mkdir(exist_ok=True)
    config = tiny_config(folder, steps=STEPS)
    config = replace(config, checkpoint=CheckpointConfig(every_steps=HALF), precision=precision)
    return replace(config, model=replace(config.model, layers=1, d_model=32, ffn=64, heads=2))


def trained(
    folder: Path, config: RunConfig, world_size: int, checkpoint: Path | None = None
) -> tuple[World, dict[int, float]]:
    """A run to its end, or from `checkpoint` on; its losses by step."""
    with World(folder, config, world_size) as world:
        attempt = {"attempt": "1.01", "generation": 2} if checkpoint else {"attempt": "1.00"}
        world.begin(checkpoint=checkpoint, **attempt)
        assert {leaving.code for leaving in world.finish()} == {0}
    return world, {step: line["loss"] for step, line in world.ranks[0].metrics.items()}


def test_fp16_follows_fp32_while_its_scale_grows(tmp_path: Path) -> None:
    _, expected = trained(
        tmp_path / "fp32", small(tmp_path / "fp32", PrecisionConfig(compute="fp32")), 1
    )
    assert expected[STEPS] < expected[1] - 1.0
    for name, precision in (("fp16", FP16), ("efficient", EFFICIENT)):
        world, losses = trained(tmp_path / name, small(tmp_path / name, precision), 1)
        assert losses == pytest.approx(expected, rel=2e-3)
        scales = {step: line["loss_scale"] for step, line in world.ranks[0].metrics.items()}
        # 4 good steps double it and the window, which counts on: 8, then 16. Each shows in the step
        # behind.
        assert scales == {
            s: 4.0 if s <= 4 else 8.0 if s <= 8 else 16.0 if s <= 16 else 32.0 for s in range(1, 25)
        }


def test_resumed_run_equals_the_uninterrupted_one_with_its_scale(tmp_path: Path) -> None:
    """The checkpoint lies in the middle of the scaler's window: the count goes on, too."""
    config = small(tmp_path, EFFICIENT)
    world, _ = trained(tmp_path, config, 2)
    expected, half, end = world.ranks[0].metrics, world.commit(HALF), world.commit(STEPS)
    saved = json.loads((half / "state.json").read_text())["loss_scale"]
    assert (saved["scale"], saved["window_steps"], saved["steps"]) == (16.0, 16, 14)

    world, _ = trained(tmp_path, config, 2, checkpoint=half)
    assert world.in_force()["loss_scale"] == 16.0
    for step, line in world.ranks[0].metrics.items():
        for key in ("loss", "grad_norm", "grad_norm_clipped", "loss_scale", "updates"):
            assert line[key] == expected[step][key], (step, key)
    again = world.commit(STEPS)
    assert tensors_in(again) == tensors_in(end)
    states = [json.loads((folder / "state.json").read_text()) for folder in (end, again)]
    assert states[0]["loss_scale"] == states[1]["loss_scale"]
    assert states[0]["loss_scale"]["scale"] == 32.0


def test_loss_scale_that_does_not_read_is_an_error() -> None:
    """A rank that took the policy's first scale instead would train on, and nobody would know."""
    scale = LossScale(policy_of(FP16), torch.device("cpu"))
    saved = {key: value for key, value in scale.to_json().items() if key != "window_steps"}
    manifest = Manifest("1.00", 5, {}, {"loss_scale": saved}, "", "", {})
    with pytest.raises(CannotStart, match="the checkpoint's loss scale does not read: KeyError"):
        load_loss_scale(scale, manifest)


def test_checkpoint_from_before_loss_scales_is_taken() -> None:
    scale = LossScale(policy_of(PrecisionConfig(compute="bf16")), torch.device("cpu"))
    load_loss_scale(scale, Manifest("1.00", 5, {}, {"loss_scale": 1.0}, "", "", {}))
    assert scale.scale.item() == 1.0


def test_loss_scale_that_is_not_the_checkpoints_stops_the_run() -> None:
    config = RunConfig(precision=FP16)
    optimizer = make_optimizer(nn.Linear(2, 2), in_force(config, (), 0))
    scale = LossScale(policy_of(FP16), torch.device("cpu"))
    manifest = Manifest(
        "1.00", 0, {}, {"loss_scale": {**scale.to_json(), "scale": 32.0}}, "", "", {}
    )
    saved = saved_loss_scale(manifest)
    with pytest.raises(CannotStart, match=r"loss_scale: expected 32\.0, in force 4\.0"):
        report_in_force(config, optimizer, scale, TrainState(), saved, "ab", {}, lambda fact: None)
    load_loss_scale(scale, manifest)
    report_in_force(config, optimizer, scale, TrainState(), saved, "ab", {}, lambda fact: None)
