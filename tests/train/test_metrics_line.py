"""A metrics line that does not fit the pipe would end the rank that tells it."""

import json
from dataclasses import replace

import pytest
import torch

from opt_train.config import RunConfig, compose
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Metrics
from opt_train.protocol.framing import MAX_FACT_BYTES
from opt_train.train.metrics import metrics_line
from opt_train.train.probed import OwnProbed, WorldProbed
from opt_train.train.state import TrainState
from opt_train.train.telling import fitting_line
from opt_train.train.word import StepWord

GIVEN = ("data.corpus=texts", "tokenizer.vocab_file=vocab.json", "tokenizer.merges_file=merges.txt")
LONG = 0.012345678901234567
"""Of 17 digits, as a double has them."""


@pytest.fixture(scope="module")
def opt_175b() -> RunConfig:
    return compose(["experiment=opt-175b", *GIVEN])


def told(config: RunConfig, norms: list[float]) -> bytes:
    """The longest line of a run with all there is: of an attempt's first step, every number of full length."""
    probed = WorldProbed(
        layer_grad_norms=tuple(norms), layer_weight_norms=tuple(norms), attention_logit_max=123.456789,
        gemm_tflops=(123.456789,) * 992,
    )  # fmt: skip
    word = StepWord(
        step=299_999, loss=LONG, tokens=2_031_616, activation_norm=LONG, grad_norm=LONG, clipped_norm=LONG,
        loss_scale=2.0**-5, skipped=False, stop_votes=0, saving_ranks=0, order_number=0, step_seconds=LONG,
        data_seconds=LONG, memory_bytes=80 << 30, probed=probed,
    )  # fmt: skip
    begin = Begin(1, "12.43", "n0", 0, 0, 992, 0, "", 0, "", "", "", "", None, None, 0)
    state = TrainState(updates=299_000, tokens=180_000_000_000)
    line = metrics_line(config, begin, state, word, LONG, torch.device("cpu"))
    return fitting_line(Metrics({**line, "mfu": LONG, "journal_head": "1000000 " + "ab" * 32}))


@pytest.mark.parametrize(
    ("norms", "most"),
    [
        pytest.param([1.2345678e-05, 123.45678] * 49, 2600, id="ordinary"),
        pytest.param([1.2345678e-05] * 98, 3000, id="small"),
        pytest.param([float("inf"), float("-inf")] * 49, 3100, id="not finite"),
    ],
)
def test_opt_175bs_line_with_every_probe_fits_the_pipe(opt_175b: RunConfig, norms: list[float], most: int) -> None:
    assert opt_175b.model.layers + 2 == 98
    line = told(opt_175b, norms)
    assert len(line) <= most < MAX_FACT_BYTES
    read = json.loads(line)["line"]
    assert len(read["layer_grad_norms"]) == len(read["layer_weight_norms"]) == 98
    if norms[0] < 1:
        assert read["layer_grad_norms"][0] == 1.2346e-05
    assert (read["attention_logit_max"], read["gemm_tflops_min"], read["gemm_slowest_rank"]) == (123.46, 123.46, 0)


def test_a_model_too_deep_for_the_line_loses_its_lists_and_nothing_else(opt_175b: RunConfig) -> None:
    deep = replace(opt_175b, model=replace(opt_175b.model, layers=300))
    line = told(deep, [LONG] * 302)
    assert len(line) <= MAX_FACT_BYTES
    read = json.loads(line)["line"]
    assert read["layer_grad_norms"] is None
    assert read["layer_weight_norms"] is None
    assert (read["loss"], read["attention_logit_max"]) == (LONG, 123.46)


def test_the_slowest_rank_has_a_name() -> None:
    speeds = [4.0, 3.9, 1.23456789, 4.1]
    owns = [OwnProbed(layer_squares=(1.0, 3.0), gemm_tflops=speed) for speed in speeds]
    summed = [sum(each) for each in zip(*(own.sums(rank, 4) for rank, own in enumerate(owns)), strict=True)]
    told = owns[0].of_world(summed, []).metrics()
    assert (told["gemm_tflops_min"], told["gemm_tflops_median"], told["gemm_slowest_rank"]) == (1.2346, 3.95, 2)
    assert (told["layer_grad_norms"], told["layer_weight_norms"]) == ([2.0], [3.4641])
