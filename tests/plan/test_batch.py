"""What a plan says of padding must be what ranks read, and losing a node must cost what the design
says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_train.data.batches import Batches
from opt_train.data.order import Cursor
from opt_train.data.token_stream import TokenStream
from opt_train.plan.batch import Batch
from opt_train.plan.refusals import refusals
from tests.plan.presets import planned, recipe

STREAM = TokenStream([np.zeros(400, dtype=np.uint16)])


@given(sequences=st.integers(1, 99), ranks=st.integers(1, 40), micro_batch=st.integers(1, 12))
def test_the_padding_is_what_ranks_really_read(
    sequences: int, ranks: int, micro_batch: int
) -> None:
    if sequences < ranks:  # refused by the configuration
        return
    batches = Batches(STREAM, 4, sequences, seed=0)
    cursor = Cursor()
    read = [
        batches.at(cursor, data_rank=r, data_world=ranks, micro_batch=micro_batch)
        for r in range(ranks)
    ]
    planned_batch = Batch.split(sequences, ranks, micro_batch)
    assert {len(own) for own in read} == {planned_batch.micro_batches}
    assert {tuple(one.tokens.shape) for own in read for one in own} == {(planned_batch.rows, 4)}
    weights = np.concatenate([one.weights.numpy() for own in read for one in own])
    assert planned_batch.computed == weights.size
    assert planned_batch.idle_share == pytest.approx(1 - float(weights.sum()) / weights.size)


def test_the_run_as_it_was_idles_nowhere() -> None:
    assert planned(recipe("175b")).batch == Batch(992, 124, 1, 8)
    assert planned(recipe("175b")).batch.idle_share == 0.0


@pytest.mark.parametrize(
    ("micro_batch", "computed"), [(9, 123 * 9), (3, 123 * 9), (1, 123 * 9), (8, 123 * 9)]
)
def test_a_node_lost_of_124_costs_a_tenth(micro_batch: int, computed: int) -> None:
    """992 sequences on 123 groups are 8 or 9 each; in micro-batches of 8 at most, 9 are three of
    3."""
    batch = Batch.split(992, 123, micro_batch)
    assert batch.computed == computed
    assert batch.idle_share == pytest.approx(1 - 992 / computed)


def test_a_layout_that_pads_a_tenth_is_refused_with_what_would_not() -> None:
    plan = planned(recipe("175b", "cluster.nodes=123"))
    (sentence,) = refusals(plan, allow_idle=False)
    assert sentence.startswith("10.4% of the sequences computed are padding, more than 10%")
    assert sentence.endswith("or --allow-idle")
    for mend in ("984", "1107"):
        assert f"train.global_batch={mend}" in sentence
        mended = planned(recipe("175b", "cluster.nodes=123", f"train.global_batch={mend}"))
        assert mended.batch.idle_share == 0.0
        assert refusals(mended, allow_idle=False) == []


def test_a_micro_batch_that_mends_it_is_named() -> None:
    """5 sequences on each group in micro-batches of 4 at most are 3 and 3, and 1 by 1 they are
    5."""
    five = ("train.global_batch=620", "train.micro_batch=4")
    (sentence,) = refusals(planned(recipe("175b", *five)), allow_idle=False)
    assert "use train.micro_batch=1 (0.0%)" in sentence
    assert refusals(planned(recipe("175b", *five, "train.micro_batch=1")), allow_idle=False) == []


def test_a_smaller_batch_that_is_named_is_not_refused_for_its_micro_batches() -> None:
    """256 sequences on 248 GPUs are 2 on some; with 248 there is 1 on each, and micro-batches of 2
    are refused."""
    (sentence,) = refusals(
        planned(recipe("125m", "cluster.nodes=31", "train.micro_batch=2")), allow_idle=False
    )
    mend = ("train.global_batch=248", "train.micro_batch=1")
    assert f"use {' '.join(mend)} or train.global_batch=496" in sentence
    assert planned(recipe("125m", "cluster.nodes=31", *mend)).batch.idle_share == 0.0


def test_padding_that_is_allowed_is_not_refused() -> None:
    assert refusals(planned(recipe("175b", "cluster.nodes=123")), allow_idle=True) == []


def test_one_node_fewer_is_told_and_not_refused() -> None:
    plan = planned(recipe("175b"))
    assert plan.without_a_node == Batch(992, 123, 3, 3)
    assert refusals(plan, allow_idle=False) == []


def test_a_layout_that_cannot_lose_a_node_says_so() -> None:
    assert planned(recipe("125m")).without_a_node is None
    assert planned(recipe("175b", "parallel.shard=124")).without_a_node is None
