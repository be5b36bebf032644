"""A plan's memory against arithmetic by hand and published figures."""

from dataclasses import replace

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import parameter_count
from opt_train.parallel.layout import Layout
from opt_train.plan.memory import memory_of, shards_of
from opt_train.plan.pieces import block_pieces, elements, padded, root_pieces, sharded
from tests.plan.presets import SIZES, planned, recipe

GB = 10**9


def layout_of(config: RunConfig) -> Layout:
    return Layout.of(config.parallel, config.world_size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_pieces_of_a_tensor_group_are_the_whole_model(size: str, tensor: int) -> None:
    model = recipe(size).model
    pieces = [*block_pieces(model, tensor) * model.layers, *root_pieces(model, tensor)]
    once = elements(piece for piece in pieces if piece.whole)
    split = elements(piece for piece in pieces if not piece.whole)
    assert once + tensor * split == parameter_count(model)


def test_rank_0_has_the_rows_that_are_left_over() -> None:
    """124 ranks share 1536 rows: 13 for the first ones, 12 padded to 13 in what is sent."""
    queries = block_pieces(recipe("175b").model, 8)[:1]
    assert sharded(queries, 124) == 13 * 12288
    assert padded(queries, 124) == 124 * 13 * 12288


@pytest.mark.parametrize(
    ("precision", "weight", "gradient"), [("bf16", 4, 4), ("fp16-memory-efficient", 2, 2)]
)
def test_shards_are_the_bytes_a_parameter_of_the_page_on_precision(
    precision: str, weight: int, gradient: int
) -> None:
    config = recipe("1.3b", f"precision={precision}")
    shards, count = shards_of(config, layout_of(config)), 1_315_758_080 / 32
    assert shards.parameters == pytest.approx(weight * count, rel=0.002)
    assert shards.gradients == pytest.approx(gradient * count, rel=0.002)
    assert shards.optimizer == pytest.approx(8 * count, rel=0.002)


def test_full_recomputation_keeps_one_hidden_state_a_block() -> None:
    plan = planned(recipe("175b"))
    assert plan.configured.mode == "full"
    assert plan.configured.activations == 96 * 2 * 8 * 2048 * 12288 // 8


@pytest.mark.parametrize(("compiled", "kept"), [(False, 22), (True, 26)])
def test_what_nothing_recomputed_keeps_of_a_value_of_the_hidden_state(
    compiled: bool, kept: int
) -> None:
    """Korthikanti et al. 2022 (arXiv 2205.05198, equation 1) count 34, 8 of them GELU's input; ReLU
    needs its output alone, and 4 LayerNorms' outputs, which a compiler may keep. Flash attention
    keeps no scores, but the log sums of each head's rows.
    """
    config = recipe("1.3b", "train.micro_batch=1", f"parallel.compile={compiled}")
    values = 2048 * 2048
    none = memory_of(config, layout_of(config), "none")
    assert none.activations == 24 * (kept * values + 4 * 32 * 2048)


@pytest.mark.parametrize("size", SIZES)
def test_more_recomputation_never_needs_more(size: str) -> None:
    none, selective, full = planned(recipe(size)).memory
    assert none.peak.total > selective.peak.total > full.peak.total
    assert none.activations > selective.activations > full.activations


def test_a_peak_is_the_sum_of_what_it_is_made_of() -> None:
    for memory in planned(recipe("175b")).memory:
        peak = memory.peak
        assert (
            peak.total
            == peak.shards + peak.gathered + peak.unsummed + peak.activations + peak.temporary
        )
        assert peak.shards >= memory.shards.parameters + memory.shards.optimizer


def test_whole_gradients_of_175b_do_not_fit_beside_everything_else() -> None:
    """4 bytes for each of 174.6 billion parameters, an eighth on each rank of a group: 87 GB."""
    shards = planned(recipe("175b", "train.micro_batch=1"))
    whole = planned(recipe("175b", "train.micro_batch=1", "parallel.accumulate=whole"))
    assert shards.fits
    assert not whole.fits
    more = whole.configured.peak.total - shards.configured.peak.total
    assert more == pytest.approx(4 * 174_604_468_224 / 8, rel=0.02)


def test_where_embeddings_are_most_of_it_three_of_their_gradients_meet() -> None:
    """By hand, fp32 on 8 GPUs: the table's gradients, its weights gathered, all of the shards but
    the root's."""
    config = recipe(
        "125m",
        "precision=fp32",
        "data.sequence_length=256",
        "train.global_batch=8",
        "train.micro_batch=1",
    )
    peak = planned(config).configured.peak
    table, positions = 4 * 50272 * 768, 4 * 2050 * 768
    block = 4 * (12 * 768**2 + 13 * 768)
    assert peak.when == "the backward pass of the embeddings"
    assert peak.unsummed == pytest.approx(3 * table + positions + block, rel=0.001)
    assert peak.gathered == pytest.approx(table + positions, rel=0.001)
    assert peak.shards == pytest.approx(3 * 4 * 125_239_296 / 8 + 12 * block / 8, rel=0.001)


def test_one_micro_batch_adds_up_nothing() -> None:
    assert (
        planned(recipe("175b")).memory
        == planned(recipe("175b", "parallel.accumulate=whole")).memory
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_fits_an_a100_of_80_gb(size: str) -> None:
    assert planned(recipe(size)).fits


def test_a_replica_holds_what_all_its_ranks_shared_before() -> None:
    config = recipe("6.7b")
    copied = replace(config, parallel=replace(config.parallel, replicate=4))
    one, four = shards_of(config, layout_of(config)), shards_of(copied, layout_of(copied))
    assert four.optimizer == pytest.approx(4 * one.optimizer, rel=0.01)
