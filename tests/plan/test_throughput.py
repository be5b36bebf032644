"""Days and FLOPs against what was published of OPT-175B."""

import pytest

from opt_train.plan.throughput import GPUS, recomputed_flops_per_token
from opt_train.train.stats.metrics import PEAK_FLOPS
from tests.plan.presets import planned, recipe


def test_the_peaks_are_those_that_mfu_is_measured_by() -> None:
    assert {name: gpu.peak_flops for name, gpu in GPUS.items()} == PEAK_FLOPS


def test_opt_175b_takes_the_days_that_its_flops_take() -> None:
    """Of 4.30e23 FLOPs, recomputation included, at 147 TFLOP/s on each of 992 GPUs: 34.1 days."""
    time = planned(recipe("175b")).throughput
    assert time.tokens == pytest.approx(300e9, rel=1e-4)
    assert time.hardware_flops_per_token * 300e9 == pytest.approx(4.30e23, rel=0.005)
    assert time.days == pytest.approx(4.30e23 / (992 * 147e12) / 86400, rel=0.01)


def test_hardware_and_model_utilisation_are_147_of_312() -> None:
    time = planned(recipe("175b")).throughput
    again = time.hardware_flops_per_token / time.model_flops_per_token
    assert time.mfu * again == pytest.approx(147 / 312, rel=0.005)


def test_only_what_is_computed_again_is_added() -> None:
    assert recomputed_flops_per_token(recipe("1.3b", "parallel.activation_checkpointing=none")) == 0
    selective = recomputed_flops_per_token(
        recipe("1.3b", "parallel.activation_checkpointing=selective")
    )
    full = recomputed_flops_per_token(recipe("1.3b", "parallel.activation_checkpointing=full"))
    attention = 24 * (8 * 2048**2 + 4 * 2048 * 2048)
    assert selective == attention
    # The feed-forward network's 16 d^2 a layer besides, positions and vectors counted with N.
    assert full == pytest.approx(attention + 24 * 16 * 2048**2, rel=0.01)


def test_padding_costs_time() -> None:
    whole, padded = (planned(recipe("175b", f"cluster.nodes={nodes}")) for nodes in (124, 123))
    assert whole.throughput.step_seconds is not None
    assert padded.throughput.step_seconds == pytest.approx(whole.throughput.step_seconds * 9 / 8)
    assert padded.throughput.tokens_per_step == whole.throughput.tokens_per_step


def test_a_checkpoint_holds_weights_and_moments_once() -> None:
    """12 bytes a parameter with fp32 weights, 10 with fp16 ones; copies are not saved again."""
    assert planned(recipe("1.3b")).checkpoint.bytes == 12 * 1_315_758_080
    copied = planned(recipe("1.3b", "parallel.replicate=4")).checkpoint
    assert copied.bytes == 12 * 1_315_758_080
    assert copied.ranks == 8
    assert copied.bytes_per_rank * copied.ranks == pytest.approx(copied.bytes)
