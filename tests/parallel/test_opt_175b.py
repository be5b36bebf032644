"""OPT-175B on 124 nodes of 8 GPUs: the very code of a real run, rehearsed in one process with empty
tensors."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from opt_train.config.run_config import RunConfig
from tests.forms import FORMS
from tests.plan.presets import planned, recipe, rehearsed, with_layers

PARAMETERS = 174_604_468_224
"""arXiv 2205.01068, table 1, counted with 50272 tokens and 2050 positions."""
RANKS = 992
GPU_BYTES = 80 * 10**9
LAYERS = 96
DEPTHS = (3, 4)
HALF = 4
"""Sequences in a micro-batch, of the eight of a rank."""


Rehearsal = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def few_layers() -> list[dict[str, Any]]:
    """Rehearsals of `DEPTHS` layers: as `experiment=opt-175b` has them, and with the batch in two;
    in one process, because its start takes longest."""
    configs = [recipe("175b"), recipe("175b", f"train.micro_batch={HALF}")]
    return rehearsed(
        [with_layers(config, layers) for config in configs for layers in DEPTHS], seconds=280
    )


@pytest.fixture(scope="module")
def rehearsal(request: pytest.FixtureRequest) -> Rehearsal:
    """All 96 layers, as `experiment=opt-175b` has them; in short, what two depths tell of them."""

    @functools.cache
    def of(form: str) -> dict[str, Any]:
        if form == "short":
            return of_all_layers(*request.getfixturevalue("few_layers")[:2])
        (only,) = rehearsed([recipe("175b")], seconds=580)
        return only

    return of


UNTOLD = "held_at_peak"
"""The largest first, so that depths have other tensors in other places."""


def of_all_layers(shallow: Any, deeper: Any) -> Any:
    """What a rehearsal of 96 layers would say by those of `DEPTHS`, but for `UNTOLD`: beyond three
    each adds the same, to every number."""
    if isinstance(shallow, dict):
        return {
            key: of_all_layers(value, deeper[key])
            for key, value in shallow.items()
            if key != UNTOLD
        }
    if isinstance(shallow, list):
        return [of_all_layers(*each) for each in zip(shallow, deeper, strict=True)]
    if not isinstance(shallow, int):
        assert shallow == deeper
        return shallow
    return shallow + (LAYERS - DEPTHS[0]) * (deeper - shallow) // (DEPTHS[1] - DEPTHS[0])


@pytest.mark.parametrize("form", FORMS)
def test_all_of_it_is_there(rehearsal: Rehearsal, form: str) -> None:
    assert rehearsal(form)["parameters"] == PARAMETERS


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_holds_its_share_of_the_state(rehearsal: Rehearsal, form: str) -> None:
    """fp16 weights and gradients and two fp32 moments, each split over 992 ranks, but for what
    groups hold whole."""
    state = rehearsal(form)["state"]
    assert state["parameters"] == pytest.approx(2 * PARAMETERS / RANKS, rel=0.03)
    assert state["gradients"] == state["parameters"]
    assert state["optimizer"] == 4 * state["parameters"]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_larger_than_a_block_is_ever_made(rehearsal: Rehearsal, form: str) -> None:
    """The largest tensor is what one block's gradients are summed in: fp32, an eighth of the
    block."""
    block = 12 * 12288**2 + 13 * 12288
    assert rehearsal(form)["largest_temporary"] <= 1.02 * 4 * block / 8


@pytest.mark.parametrize("form", FORMS)
def test_it_fits(rehearsal: Rehearsal, form: str) -> None:
    assert 0 < rehearsal(form)["peak"] < GPU_BYTES


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_gathered_twice_and_gradients_summed_once(
    rehearsal: Rehearsal, form: str
) -> None:
    """Each of 96 blocks is gathered for forward and backward, the root once; in fp16, and gradients
    summed in fp32."""
    rows = {(row["kind"], row["ranks"]): row for row in rehearsal(form)["collectives"]}
    assert rows["all_gather", 124]["count"] == 2 * 96 + 1
    assert rows["reduce_scatter", 124]["count"] == 96 + 1
    assert rows["all_gather", 124]["bytes"] == pytest.approx(2 * 2 * PARAMETERS / 8, rel=0.03)
    assert rows["reduce_scatter", 124]["bytes"] == pytest.approx(4 * PARAMETERS / 8, rel=0.03)
    assert rows["all_reduce", RANKS]["count"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_block_talks_six_times_each_way_within_its_node(rehearsal: Rehearsal, form: str) -> None:
    """Gathered and scattered around attention and the feed-forward network: forward, once more, and
    backward."""
    rows = {(row["kind"], row["ranks"]): row for row in rehearsal(form)["collectives"]}
    hidden = 2 * 8 * 2048 * 12288
    for kind in ("all_gather", "reduce_scatter"):
        assert rows[kind, 8]["count"] == 6 * 96 + 2
        assert rows[kind, 8]["bytes"] == rows[kind, 8]["count"] * hidden


def test_two_micro_batches_fit_too(few_layers: list[dict[str, Any]]) -> None:
    """Gradients add up in shards."""
    check_fits(recipe("175b", f"train.micro_batch={HALF}"), *few_layers[2:])


@pytest.mark.whole
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_several_micro_batches_fit_too(micro_batch: int) -> None:
    config = recipe("175b", f"train.micro_batch={micro_batch}")
    check_fits(config, *rehearsed([with_layers(config, layers) for layers in DEPTHS], seconds=280))


def check_fits(config: RunConfig, shallow: dict[str, Any], deeper: dict[str, Any]) -> None:
    """Assert that all layers fit, and that the plan says so too."""
    assert config.parallel.accumulate == "shards"
    peak = of_all_layers(shallow, deeper)["peak"]
    assert 0 < peak < GPU_BYTES
    assert planned(config).configured.peak.total == pytest.approx(peak, rel=0.05)


@pytest.mark.whole
def test_two_depths_tell_of_all_layers(rehearsal: Rehearsal) -> None:
    whole, short = rehearsal("whole"), rehearsal("short")
    assert short["peak"] == pytest.approx(whole["peak"], rel=1e-3)
    told = {key: value for key, value in whole.items() if key != UNTOLD}
    assert {**short, "peak": whole["peak"]} == told
