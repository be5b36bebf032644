"""A metrics line that says something else than docs/metrics.md, or does not fit the pipe, which
would end the rank."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from opt_train.config.compose import compose
from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DatasetManifest
from opt_train.data.order import SampleOrder
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Metrics
from opt_train.protocol.framing import MAX_FACT_BYTES
from opt_train.train.fact_pipe import fitting_line
from opt_train.train.state import TrainState
from opt_train.train.stats.metrics import METRICS, MetricsSource, metrics_line
from opt_train.train.stats.step_stats import (
    COLUMNS,
    Packed,
    RankStats,
    StatsColumns,
    StepStats,
    pack,
    step_metrics,
    unpack,
)
from tests.model.twins import hugging_face
from tests.train.rig import World, tiny_config

GIVEN = ("data.corpus=texts", "tokenizer.vocab_file=vocab.json", "tokenizer.merges_file=merges.txt")
LONG = 0.012345678901234567
"""Of 17 digits, as a double has them."""


def source(
    config: RunConfig,
    begin: Begin,
    state: TrainState,
    stats: StepStats,
    learning_rate: float,
    device: torch.device,
) -> MetricsSource:
    return MetricsSource(
        config=config,
        begin=begin,
        state=state,
        stats=stats,
        learning_rate=learning_rate,
        samples=(stats.step + 1) * config.train.global_batch,
        device=device,
        loss_scale_floor=2.0**-5,
    )


@pytest.fixture(scope="module")
def opt_175b() -> RunConfig:
    return compose(["experiment=opt-175b", *GIVEN])


def published(config: RunConfig, norms: list[float]) -> bytes:
    """The longest line of a run with all there is: of an attempt's first step, every number of full
    length."""
    squares = tuple(norm * abs(norm) for norm in norms)
    stats = StepStats(
        step=299_999,
        loss_sum=LONG * 2_031_616,
        tokens=2_031_616,
        activation_squares=LONG**2 * 2_031_616,
        grad_norm=LONG,
        clipped_norm=LONG,
        loss_scale=2.0**-5,
        step_seconds=LONG,
        data_seconds=LONG,
        memory_bytes=80 << 30,
        embedding_squares=0.123456 * LONG**2,
        layer_grad_squares=squares,
        layer_weight_squares=squares,
        attention_logit=123.456789,
        sampled_logit=LONG,
        gemm_tflops=(123.456789,) * 992,
        sequences=992,
        token_entropies=LONG,
        equal_labels=LONG,
        duplicates=LONG,
    )
    assert stats.loss == stats.activation_norm == LONG, "of full length"
    begin = Begin(1, "12.43", "n0", 0, 0, 992, 0, "", 0, "", "", "", None, None, 0)
    state = TrainState(updates=299_000, tokens=180_000_000_000)
    line = metrics_line(source(config, begin, state, stats, LONG, torch.device("cpu")))
    return fitting_line(Metrics({**line, "mfu": LONG, "journal_head": "1000000 " + "ab" * 32}))


@pytest.mark.parametrize(
    ("norms", "most"),
    [
        pytest.param([1.2345678e-05, 123.45678] * 49, 2850, id="ordinary"),
        pytest.param([1.2345678e-05] * 98, 3250, id="small"),
        pytest.param([float("inf"), float("-inf")] * 49, 3400, id="not finite"),
    ],
)
def test_opt_175bs_line_with_every_probe_fits_the_pipe(
    opt_175b: RunConfig, norms: list[float], most: int
) -> None:
    assert opt_175b.model.layers + 2 == 98
    line = published(opt_175b, norms)
    assert len(line) <= most < MAX_FACT_BYTES
    read = json.loads(line)["line"]
    assert len(read["layer_grad_norms"]) == len(read["layer_weight_norms"]) == 98
    if norms[0] < 1:
        assert read["layer_grad_norms"][0] == 1.2346e-05
    assert (read["attention_logit_max"], read["gemm_tflops_min"], read["gemm_slowest_rank"]) == (
        123.46,
        123.46,
        0,
    )


def test_a_model_too_deep_for_the_line_loses_its_lists_and_nothing_else(
    opt_175b: RunConfig,
) -> None:
    deep = replace(opt_175b, model=replace(opt_175b.model, layers=300))
    line = published(deep, [LONG] * 302)
    assert len(line) <= MAX_FACT_BYTES
    read = json.loads(line)["line"]
    assert read["layer_grad_norms"] is None
    assert read["layer_weight_norms"] is None
    assert (read["loss"], read["attention_logit_max"]) == (LONG, 123.46)


def test_every_column_has_a_field_and_every_field_a_column() -> None:
    assert sorted(column.name for column in COLUMNS) == sorted(
        field.name for field in fields(StatsColumns)
    )


def test_every_metric_has_its_key_once_and_a_line_has_them_all(opt_175b: RunConfig) -> None:
    keys = [metric.key for metric in METRICS]
    assert len(set(keys)) == len(keys)
    begin = Begin(1, "12.43", "n0", 0, 0, 992, 0, "", 0, "", "", "", None, None, 0)
    begin = replace(begin, journal_head="1 ab")
    given = source(opt_175b, begin, TrainState(), StepStats(step=0), 1e-4, torch.device("cpu"))
    assert list(metrics_line(given, is_first=True)) == keys
    assert list(metrics_line(given)) == [key for key in keys if key != "journal_head"]


def test_what_ranks_pack_is_what_the_world_unpacks() -> None:
    """Each column is found where it was put, whatever others have put before it; a count comes back
    as a count."""
    ranks = [
        RankStats(
            loss_sum=10.0 + rank,
            tokens=4.0,
            activation_squares=100.0 + rank,
            skipping_ranks=1,
            stop_votes=rank,
            saving_ranks=int(rank == 1),
            grad_norm=0.5 + rank,
            clipped_norm=0.25 + rank,
            loss_scale=8.0 + rank,
            order_number=7 + rank,
            step_seconds=3.0 - rank,
            data_seconds=0.1 + rank,
            memory_bytes=1000 + rank,
            layer_grad_squares=(1.0, 2.0 * rank, 3.0),
            layer_weight_squares=(4.0, 5.0, 6.0 * rank),
            attention_logit=-1.0 - rank,
            gemm_tflops=(0.5 + rank,),
            sequences=2.0,
            token_entropies=1.5 * rank,
            equal_labels=0.5 + rank,
            duplicates=float(rank == 2),
        )
        for rank in range(3)
    ]
    packed = [pack(own, rank, 3) for rank, own in enumerate(ranks)]
    sums = [sum(each) for each in zip(*(rank.sums for rank in packed), strict=True)]
    maxima = [max(each) for each in zip(*(rank.maxima for rank in packed), strict=True)]
    expected = StepStats(
        step=9,
        loss_sum=33.0,
        tokens=12,
        activation_squares=303.0,
        skipping_ranks=3,
        stop_votes=3,
        saving_ranks=1,
        grad_norm=0.5,
        clipped_norm=0.25,
        loss_scale=8.0,
        order_number=7,
        step_seconds=3.0,
        data_seconds=2.1,
        memory_bytes=1002,
        layer_grad_squares=(3.0, 6.0, 9.0),
        layer_weight_squares=(12.0, 15.0, 18.0),
        attention_logit=-1.0,
        gemm_tflops=(0.5, 1.5, 2.5),
        sequences=6.0,
        token_entropies=4.5,
        equal_labels=4.5,
        duplicates=1.0,
    )
    for own in ranks:
        stats = unpack(9, own, 3, Packed(sums, maxima))
        assert stats == expected
        assert isinstance(stats.tokens, int)
        assert isinstance(stats.order_number, int)


def test_a_metrics_line_keeps_its_published_keys(opt_175b: RunConfig) -> None:
    """By hand: those who read old runs, and detectors, ask for them by name."""
    assert {metric.key for metric in METRICS} == {
        *("attempt", "step", "updates", "samples", "tokens", "time", "loss", "lr", "grad_norm"),
        *("grad_norm_clipped", "activation_norm", "loss_scale", "overflow", "skipped"),
        *("tokens_per_second", "mfu", "step_seconds", "data_seconds", "memory_bytes"),
        *("layer_grad_norms", "layer_weight_norms", "attention_logit_max", "gemm_tflops_min"),
        *("gemm_tflops_median", "gemm_slowest_rank", "journal_head"),
        *("batch_token_entropy", "batch_equal_labels", "batch_duplicates", "batch_repeats"),
        *("replay_differs", "replay_rank"),
        "embedding_grad_ratio",
        "loss_scale_floor",
        *("update_ratio", "attention_logit", "clip_factor"),
    }


def test_the_slowest_rank_has_a_name() -> None:
    speeds = [4.0, 3.9, 1.23456789, 4.1]
    owns = [
        RankStats(layer_grad_squares=(1.0,), layer_weight_squares=(3.0,), gemm_tflops=(speed,))
        for speed in speeds
    ]
    packed = [pack(own, rank, 4) for rank, own in enumerate(owns)]
    sums = [sum(each) for each in zip(*(rank.sums for rank in packed), strict=True)]
    line = step_metrics(unpack(0, owns[0], 4, Packed(sums, packed[0].maxima)))
    assert (line["gemm_tflops_min"], line["gemm_tflops_median"], line["gemm_slowest_rank"]) == (
        1.2346,
        3.95,
        2,
    )
    assert (line["layer_grad_norms"], line["layer_weight_norms"]) == ([2.0], [3.4641])


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A10G", None),
    ],
)
def test_mfu_is_that_of_the_formula_and_null_for_another_peak(
    opt_175b: RunConfig, monkeypatch: pytest.MonkeyPatch, device: str, peak: float | None
) -> None:
    """N of the formula is the paper's 175B within a part in a hundred."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: device)
    begin = Begin(1, "12.43", "n0", 0, 0, 992, 0, "", 0, "", "", "", None, None, 0)
    stats = StepStats(step=9, loss_sum=2.0 * 992 * 2048, tokens=992 * 2048, step_seconds=16.0)
    cuda = torch.device("cuda", 0)
    line = metrics_line(source(opt_175b, begin, TrainState(), stats, 1e-4, cuda))
    assert line["tokens_per_second"] == 992 * 2048 / 16.0
    if peak is None:
        assert line["mfu"] is None
        return
    flops_a_token = 6 * 174.6e9 + 12 * 96 * 12288 * 2048
    assert line["mfu"] == pytest.approx(2048 / 16.0 * flops_a_token / peak, rel=0.01)


def test_a_worlds_lines_are_those_of_hugging_face_and_torch(tmp_path: Path) -> None:
    """Two ranks, five steps; without dropout, which the two would draw differently."""
    config = tiny_config(tmp_path, steps=5)
    config = replace(config, model=replace(config.model, dropout=0.0))
    began = time.time()
    with World(tmp_path, config) as world:
        world.begin()
        world.finish()
        lines = world.ranks[0].metrics
    seconds = time.time() - began
    assert list(lines) == [1, 2, 3, 4, 5]
    assert lines[5].keys() == lines[1].keys() - {"journal_head"}
    for step, (line, expected) in enumerate(
        zip(lines.values(), by_hand(config), strict=True), start=1
    ):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=2e-5), f"{key} of step {step}"
        assert (line["attempt"], line["updates"], line["samples"], line["tokens"]) == (
            "1.00",
            step,
            8 * step,
            512 * step,
        )
        assert (line["loss_scale"], line["overflow"], line["skipped"], line["mfu"]) == (
            1.0,
            False,
            False,
            None,
        )
        assert line["tokens_per_second"] == pytest.approx(512 / line["step_seconds"])
        assert 0 < line["data_seconds"] < line["step_seconds"] < seconds
        assert began < line["time"] < began + seconds
        assert 50e6 < line["memory_bytes"] < 5e9, "bytes, of a process that has torch"
    assert lines[1]["grad_norm_clipped"] < lines[1]["grad_norm"], (
        "nothing was clipped: the test shows less"
    )


def by_hand(config: RunConfig) -> Iterator[dict[str, float]]:
    """Each step's numbers by Hugging Face's OPT, torch's clipping and AdamW, in one process."""
    ours, model = OPT(config.model), hugging_face(config.model)
    initialise(ours, config.model, config.seed)
    model.load_state_dict(ours.state_dict(), strict=False)
    model.tie_weights()
    outputs: list[Tensor] = []
    model.model.decoder.layers[-1].register_forward_hook(
        lambda _layer, _inputs, output: outputs.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    length, batch = config.data.sequence_length, config.train.global_batch
    directory = Path(config.data.directory)
    shards = DatasetManifest.read(directory).shards_of("train")
    tokens = np.concatenate(
        [np.fromfile(directory / shard.path, dtype="<u2") for shard in shards]
    ).astype(np.int64)
    order = SampleOrder((len(tokens) - 1) // length, config.seed)
    # Warm-up over 4 batches, then from the peak at batch 3 down to a tenth at batch 5, where the
    # run ends.
    rates = [0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3 - 0.5 * 2.7e-3]
    for step, rate in enumerate(rates):
        starts = [order.index(step * batch + row) * length for row in range(batch)]
        blocks = torch.from_numpy(
            np.stack([tokens[start : start + length + 1] for start in starts])
        )
        outputs.clear()
        loss = cross_entropy(model(blocks[:, :-1]).logits.flatten(0, 1), blocks[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        gradients = [
            parameter.grad.flatten()
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        yield {
            "step": step + 1,
            "loss": loss.item(),
            "lr": rate,
            "grad_norm": norm,
            "grad_norm_clipped": float(torch.cat(gradients).norm()),
            "activation_norm": math.sqrt(
                float(outputs[0].detach().square().sum()) / (batch * length)
            ),
        }
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
