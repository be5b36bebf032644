"""OPT-175B on 124 nodes of 8 GPUs: the very code of a real run, rehearsed in one process with empty tensors."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.rig import run_script

SCRIPT = Path(__file__).with_name("rehearsal.py")
PARAMETERS = 174_604_468_224
"""arXiv 2205.01068, table 1, counted with 50272 tokens and 2050 positions."""
RANKS = 992
GPU_BYTES = 80 * 10**9
OVERRIDES = [
    "model=opt-175b",
    "parallel.tensor=8",
    "parallel.activation_checkpointing=full",
    "cluster.nodes=124",
    "cluster.slots_per_node=8",
    "train.global_batch=992",
    "train.micro_batch=8",
    "data.sequence_length=2048",
    "tokenizer.vocab_size=50272",
    "precision=bf16",
]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rehearsal")
    return run_script(SCRIPT, 1, json.dumps(OVERRIDES), folder=folder, seconds=280)[0]


def test_all_of_it_is_there(rehearsal: dict[str, Any]) -> None:
    assert rehearsal["parameters"] == PARAMETERS


def test_a_rank_holds_its_share_of_the_state(rehearsal: dict[str, Any]) -> None:
    """fp32 weights, gradients and two moments, each split over 992 ranks, but for what tensor groups hold whole."""
    state = rehearsal["state"]
    assert state["parameters"] == pytest.approx(4 * PARAMETERS / RANKS, rel=0.03)
    assert state["gradients"] == state["parameters"]
    assert state["optimizer"] == 2 * state["parameters"]


def test_nothing_larger_than_a_block_is_ever_made(rehearsal: dict[str, Any]) -> None:
    """The largest tensor is what one block's gradients are summed in: fp32, an eighth of the block."""
    block = 12 * 12288**2 + 13 * 12288
    assert rehearsal["largest_temporary"] <= 1.02 * 4 * block / 8


def test_it_fits(rehearsal: dict[str, Any]) -> None:
    assert 0 < rehearsal["peak"]["Total"] < GPU_BYTES


def test_weights_are_gathered_twice_and_gradients_summed_once(rehearsal: dict[str, Any]) -> None:
    """Each of 96 blocks is gathered for forward and backward, the root once; in bf16, and gradients summed in fp32."""
    rows = {(row["kind"], row["ranks"]): row for row in rehearsal["collectives"]}
    assert rows["all_gather", 124]["count"] == 2 * 96 + 1
    assert rows["reduce_scatter", 124]["count"] == 96 + 1
    assert rows["all_gather", 124]["bytes"] == pytest.approx(2 * 2 * PARAMETERS / 8, rel=0.03)
    assert rows["reduce_scatter", 124]["bytes"] == pytest.approx(4 * PARAMETERS / 8, rel=0.03)
    assert rows["all_reduce", RANKS]["count"] == 1
