"""OPT-175B on 124 nodes of 8 GPUs: the very code of a real run, rehearsed in one process with empty
tensors."""

from typing import Any

import pytest

from tests.plan.presets import planned, recipe, rehearsed, with_layers

PARAMETERS = 174_604_468_224
"""arXiv 2205.01068, table 1, counted with 50272 tokens and 2050 positions."""
RANKS = 992
GPU_BYTES = 80 * 10**9

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def rehearsal() -> dict[str, Any]:
    """All 96 layers, as `experiment=opt-175b` has them."""
    (only,) = rehearsed([recipe("175b")], seconds=580)
    return only


def test_all_of_it_is_there(rehearsal: dict[str, Any]) -> None:
    assert rehearsal["parameters"] == PARAMETERS


def test_a_rank_holds_its_share_of_the_state(rehearsal: dict[str, Any]) -> None:
    """fp16 weights and gradients and two fp32 moments, each split over 992 ranks, but for what
    groups hold whole."""
    state = rehearsal["state"]
    assert state["parameters"] == pytest.approx(2 * PARAMETERS / RANKS, rel=0.03)
    assert state["gradients"] == state["parameters"]
    assert state["optimizer"] == 4 * state["parameters"]


def test_nothing_larger_than_a_block_is_ever_made(rehearsal: dict[str, Any]) -> None:
    """The largest tensor is what one block's gradients are summed in: fp32, an eighth of the
    block."""
    block = 12 * 12288**2 + 13 * 12288
    assert rehearsal["largest_temporary"] <= 1.02 * 4 * block / 8


def test_it_fits(rehearsal: dict[str, Any]) -> None:
    assert 0 < rehearsal["peak"] < GPU_BYTES


def test_weights_are_gathered_twice_and_gradients_summed_once(rehearsal: dict[str, Any]) -> None:
    """Each of 96 blocks is gathered for forward and backward, the root once; in fp16, and gradients
    summed in fp32."""
    rows = {(row["kind"], row["ranks"]): row for row in rehearsal["collectives"]}
    assert rows["all_gather", 124]["count"] == 2 * 96 + 1
    assert rows["reduce_scatter", 124]["count"] == 96 + 1
    assert rows["all_gather", 124]["bytes"] == pytest.approx(2 * 2 * PARAMETERS / 8, rel=0.03)
    assert rows["reduce_scatter", 124]["bytes"] == pytest.approx(4 * PARAMETERS / 8, rel=0.03)
    assert rows["all_reduce", RANKS]["count"] == 1


def test_a_block_talks_six_times_each_way_within_its_node(rehearsal: dict[str, Any]) -> None:
    """Gathered and scattered around attention and the feed-forward network: forward, once more, and
    backward."""
    rows = {(row["kind"], row["ranks"]): row for row in rehearsal["collectives"]}
    hidden = 2 * 8 * 2048 * 12288
    for kind in ("all_gather", "reduce_scatter"):
        assert rows[kind, 8]["count"] == 6 * 96 + 2
        assert rows[kind, 8]["bytes"] == rows[kind, 8]["count"] * hidden


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_several_micro_batches_fit_too(micro_batch: int) -> None:
    """Gradients add up in shards. Beyond three each layer adds the same, so two depths tell of all
    96."""
    config = recipe("175b", f"train.micro_batch={micro_batch}")
    assert config.parallel.accumulate == "shards"
    shallow, deeper = rehearsed([with_layers(config, layers) for layers in (3, 5)], seconds=280)
    layer = (deeper["peak"] - shallow["peak"]) / 2
    peak = deeper["peak"] + 91 * layer
    assert 0 < peak < GPU_BYTES
    assert planned(config).configured.peak.total == pytest.approx(peak, rel=0.05)
