"""Probes that are wrong, or that change what they look at: against plain PyTorch in one process, on
every layout."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.data.batches import MicroBatch
from opt_train.model.attention_logit import (
    SAMPLE,
    WHOLE,
    Extent,
    note_largest_logits,
    note_logits,
)
from opt_train.model.decoder import OPT, Attention
from opt_train.model.init import initialise
from opt_train.optim.per_layer_norms import LayerSquares
from opt_train.parallel.engine import Engine
from opt_train.parallel.layout import Layout
from opt_train.train.config import TrainConfig
from opt_train.train.probes import Probes, noting_logits
from opt_train.train.stats.step_stats import RankStats, pack, step_metrics, unpack
from tests.parallel.layout_ranks import MODEL, VALUES, global_batch, share
from tests.parallel.test_layouts import INDUCTOR
from tests.train.probe_ranks import STEPS
from tests.train.rig import World, run_script, tensors_in, tiny_config

SCRIPT = Path(__file__).with_name("probe_ranks.py")
FULL, SELECTIVE = ({"activation_checkpointing": mode} for mode in ("full", "selective"))
COMPILED = {"compile": True}
RELEASED_350M = {"layer_norm": "post", "embed_dim": 32}
ONE = [
    ("plain", (1, 1, 1), {}, {}, {}),
    ("350M's variant", (1, 1, 1), {}, RELEASED_350M, {}),
    ("dropout, recomputed", (1, 1, 1), FULL, {"dropout": 0.1}, {}),
    ("fp16", (1, 1, 1), {}, {}, {"compute": "fp16", "weights": "fp16"}),
    ("compiled, recomputed", (1, 1, 1), COMPILED | FULL, {}, {}),
]
FOUR = [
    ("FSDP", (1, 4, 1), {}, {}, {}),
    ("HSDP", (2, 2, 1), FULL | {"accumulate": "whole"}, {}, {}),
    ("tensor", (1, 2, 2), SELECTIVE, {}, {}),
    ("tensor, 350M's variant", (1, 2, 2), {}, RELEASED_350M, {}),
]
THREE = [("padded", (1, 3, 1), {}, {}, {})]
"""Eight sequences: one rank has padding."""
TWO = [
    ("two shards", (1, 2, 1), {}, {}, {}),
    ("tensor, compiled", (1, 1, 2), COMPILED | SELECTIVE, {}, {}),
]
WORLDS = {1: ONE, 2: TWO, 3: THREE, 4: FOUR}
CASES = [(world, case) for world, cases in WORLDS.items() for case in cases]
SHORT = ("plain", "dropout, recomputed", "fp16", "two shards", "padded", "HSDP", "tensor")
IN_FORMS = [
    pytest.param(form, *case, marks=marks, id=f"{form}-{case[1][0]}")
    for form, marks in (("short", ()), ("whole", pytest.mark.whole))
    for case in CASES
    if form == "whole" or case[1][0] in SHORT
]

KINDS = ("layer_grad_norms", "layer_weight_norms", "attention_logit_max", "gemm_tflops")


Seen = Callable[[str], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each rank of each case reported, by form."""

    @functools.cache
    def of(form: str) -> dict[str, list[dict[str, Any]]]:
        reports: dict[str, list[dict[str, Any]]] = {}
        for world, all_cases in WORLDS.items():
            cases = [case for case in all_cases if form == "whole" or case[0] in SHORT]
            folder = tmp_path_factory.mktemp("probes")
            imports = [INDUCTOR] if any("compile" in case[2] for case in cases) else []
            ranks = run_script(
                SCRIPT, world, json.dumps(cases), folder=folder, seconds=300, imports=imports
            )
            reports |= {name: [rank[name] for rank in ranks] for name, *_ in cases}
        return reports

    return of


def norm(tensors: list[Tensor]) -> float:
    return float(
        torch.linalg.norm(torch.cat([tensor.detach().double().flatten() for tensor in tensors]))
    )


def by_layer(model: OPT, of_gradients: bool) -> list[float]:
    """L2 norms of gradients or weights: of what the forward pass meets before, in and behind the
    layers."""
    decoder = model.model.decoder
    before = [decoder.embed_tokens, decoder.embed_positions, decoder.project_in]
    behind = [decoder.project_out, decoder.final_layer_norm]
    groups = [before, *([layer] for layer in decoder.layers), behind]
    parameters = [
        [p for module in group if module is not None for p in module.parameters()]
        for group in groups
    ]
    chosen = [[p.grad if of_gradients else p for p in group] for group in parameters]
    return [norm(group) if group else 0.0 for group in chosen]


def largest_logit(model: OPT, tokens: Tensor) -> float:
    """Over all layers, heads and causal pairs, from whole matrices of what the projections gave."""
    found: list[Tensor] = []

    def look(attention: Attention, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        query, key = (
            F.linear(inputs[0], projection.weight, projection.bias)
            .unflatten(-1, (attention.heads, -1))
            .transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        logits = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        found.append(logits[..., seen].max())

    handles = [layer.self_attn.register_forward_hook(look) for layer in model.model.decoder.layers]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return max(float(value) for value in found)


@functools.cache
def textbook(released_350m: bool, data_world: int) -> list[dict[str, Any]]:
    """Plain PyTorch in one process: the mean loss of the whole batch, torch's autograd, clipping
    and AdamW."""
    model = OPT(replace(MODEL, **(RELEASED_350M if released_350m else {})))
    initialise(model, model.config, 3)
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim > 1],
            "weight_decay": VALUES["weight_decay"],
        },
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=VALUES["lr"], betas=(VALUES["beta1"], VALUES["beta2"]), eps=VALUES["eps"]
    )
    steps = []
    for step in range(STEPS):
        blocks = global_batch(step)
        F.cross_entropy(model(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten()).backward()
        firsts = [share(step, data_rank, data_world)[0] for data_rank in range(data_world)]
        sequences = torch.cat([first.tokens[first.weights > 0] for first in firsts])
        steps.append(
            {
                "layer_grad_norms": by_layer(model, of_gradients=True),
                "layer_weight_norms": by_layer(model, of_gradients=False),
                "attention_logit_max": largest_logit(model, sequences),
                "attention_logit": largest_logit(
                    model, torch.cat([first.tokens[:1] for first in firsts if first.weights[0] > 0])
                ),
                "grad_norm": norm([p.grad for p in model.parameters() if p.grad is not None]),
            }
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), VALUES["clip"])
        optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.mark.parametrize(("form", "world", "case"), IN_FORMS)
def test_probes_change_no_bit_of_training(form: str, world: int, case: Any, seen: Seen) -> None:
    ranks = seen(form)[case[0]]
    assert len(ranks) == world
    for rank in ranks:
        assert rank["trained"] == rank["unprobed"]


@pytest.mark.parametrize(("form", "world", "case"), IN_FORMS)
def test_probes_agree_with_plain_pytorch(form: str, world: int, case: Any, seen: Seen) -> None:
    name, degrees, _, changes, precision = case
    if changes.get("dropout"):
        pytest.skip("another draw of dropout in plain PyTorch")
    ranks = seen(form)[name]
    steps = ranks[0]["stats"]
    assert all(rank["stats"] == steps for rank in ranks), "every rank read the same"
    tolerance = 0.02 if precision else 2e-5
    reference = textbook(changes == RELEASED_350M, Layout(*degrees).data_world)
    for number, (stats, expected) in enumerate(zip(steps, reference, strict=True), start=1):
        for kind in ("grad_norm", "attention_logit"):
            assert stats[kind] == pytest.approx(expected[kind], rel=tolerance)
        if number not in (1, 3):
            assert all(stats[kind] is None for kind in KINDS)
            continue
        assert stats["layer_grad_norms"] == pytest.approx(
            expected["layer_grad_norms"], rel=tolerance, abs=1e-9
        )
        assert stats["layer_weight_norms"] == pytest.approx(
            expected["layer_weight_norms"], rel=tolerance, abs=1e-9
        )
        assert stats["attention_logit_max"] == pytest.approx(
            expected["attention_logit_max"], rel=tolerance
        )
        assert math.hypot(*stats["layer_grad_norms"]) == pytest.approx(stats["grad_norm"], rel=1e-6)
        assert len(stats["gemm_tflops"]) == world
        assert all(0 < speed < 1000 for speed in stats["gemm_tflops"])


def test_an_overflow_is_reported_of_the_layer_that_has_it() -> None:
    """Sums by a product with ones and zeros would make every layer's norm NaN."""
    names = [
        f"model.decoder.{name}"
        for name in ("embed_tokens.weight", "layers.0.fc1.bias", "layers.1.fc1.bias")
    ]
    squares = LayerSquares(
        [*names, "model.decoder.layers.1.fc2.bias"], [4, 1, 2, 1], 2, torch.device("cpu")
    )
    infinite, empty = torch.tensor([1.0, math.inf]), torch.empty(0, 3)
    found = squares.of([torch.tensor([2.0, 4.0]), infinite, torch.tensor([2.0]), empty])
    assert found.tolist() == pytest.approx([5.0, math.inf, 2.0, 0.0])


def test_a_logit_that_is_no_number_reaches_every_rank_as_infinity() -> None:
    """A maximum over ranks may lose a NaN."""
    own = RankStats(attention_logit=math.nan)
    packed = pack(own, 0, 1)
    assert math.inf in packed.maxima
    assert step_metrics(unpack(0, own, 1, packed))["attention_logit_max"] == math.inf


def test_logits_in_slices_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that do not divide the sequence; a largest logit that the causal mask hides; one that
    it does not."""
    monkeypatch.setattr("opt_train.model.attention_logit.LOGITS_AT_ONCE", 2 * 3 * 10 * 4)
    query, key = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    key[0, 1, 9] = 50 * query[0, 1, 3]  # of the future
    key[1, 2, 0] = 50 * query[1, 2, 9]
    largest = torch.full((2,), -math.inf)
    note_largest_logits(largest, query, key)
    logits = query @ key.transpose(-1, -2) / math.sqrt(8)
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    expected = torch.where(causal, logits, -math.inf).amax(dim=(1, 2, 3))
    torch.testing.assert_close(largest, expected)
    assert float(largest[0]) < float(logits[0].max())


@pytest.mark.parametrize("whole", [True, False])
def test_a_sample_is_of_every_few_positions_of_the_first_sequence(
    monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr("opt_train.model.attention_logit.SAMPLED_QUERIES", 4)
    monkeypatch.setattr(Extent, "is_whole", whole)
    query, key = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    query[0, 1, 5] *= 100  # between two of the sample
    largest = torch.full((2, 2), -math.inf)
    note_logits(largest, query, key)
    logits = query @ key.transpose(-1, -2) / math.sqrt(8)
    causal = torch.where(torch.ones(10, 10, dtype=torch.bool).tril(), logits, -math.inf)
    sample = causal[0, :, [9, 6, 3, 0]].max()
    torch.testing.assert_close(largest[SAMPLE], torch.tensor([float(sample), -math.inf]))
    expected = causal.amax(dim=(1, 2, 3)) if whole else torch.full((2,), -math.inf)
    torch.testing.assert_close(largest[WHOLE], expected)
    assert float(sample) < float(causal[0].max())


def test_logits_beyond_the_range_of_fp16_are_seen() -> None:
    query = torch.full((1, 1, 4, 64), 200.0, dtype=torch.float16)
    largest = torch.full((1,), -math.inf)
    note_largest_logits(largest, query, query)
    assert float(largest) == 200.0 * 200.0 * 64 / 8


def test_only_the_first_micro_batch_is_looked_at_and_nothing_is_left_behind() -> None:
    model = OPT(MODEL)
    initialise(model, MODEL, 3)
    blocks = global_batch(0)
    with noting_logits(model, 4, torch.device("cpu")) as largest:
        model(blocks[:4, :-1])
        first = largest.clone()
        assert all(
            layer.self_attn.largest_logits is largest for layer in model.model.decoder.layers
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        model(blocks[4:, :-1])
    assert torch.equal(largest, first)
    assert all(layer.self_attn.largest_logits is None for layer in model.model.decoder.layers)
    assert not model._forward_pre_hooks


def test_padding_does_not_count_and_an_engine_that_knows_no_layers_tells_none() -> None:
    model = OPT(MODEL)
    initialise(model, MODEL, 3)
    tokens = global_batch(0)[:, :-1]
    each = [largest_logit(model, tokens[row : row + 1]) for row in range(8)]
    last = [max(range(8), key=each.__getitem__), min(range(8), key=each.__getitem__)]
    batch = MicroBatch(tokens[last], tokens[last], torch.tensor([0.0, 1.0]))
    probes = Probes(
        TrainConfig(layer_norms_every=1, attention_logit_every=1, speed_probe_every=0),
        step=1,
        first=True,
        engine=cast(Engine, SimpleNamespace(model=model)),
        device=torch.device("cpu"),
    )
    with probes.watching_attention([batch]):
        model(batch.tokens)
    probes.measure_layers(torch.ones((), dtype=torch.float64))
    own = RankStats(**probes.results([float(value) for value in probes.on_device]))
    assert own.attention_logit == pytest.approx(min(each), rel=1e-5)
    line = step_metrics(unpack(0, own, 1, pack(own, 0, 1)))
    assert (line["layer_grad_norms"], line["layer_weight_norms"]) == (None, None)


KEYS = (
    "layer_grad_norms",
    "layer_weight_norms",
    "attention_logit_max",
    "gemm_tflops_min",
    "gemm_tflops_median",
    "gemm_slowest_rank",
)


def test_the_trainer_tells_them_on_their_steps_and_after_a_start_and_trains_the_same(
    tmp_path: Path,
) -> None:
    steps = {"steps": 6, "layer_norms_every": 3, "attention_logit_every": 4, "speed_probe_every": 0}
    config = replace(tiny_config(tmp_path, **steps), checkpoint=CheckpointConfig(every_steps=4))
    with World(tmp_path, config, world_size=1) as world:
        world.begin()
        world.finish()
        lines = world.ranks[0].metrics
        probed, checkpoint = tensors_in(world.commit(6)), world.commit(4)
    measured = {
        step: [key for key in KEYS if line[key] is not None] for step, line in lines.items()
    }
    norms, logit = list(KEYS[:2]), [KEYS[2]]
    assert measured == {1: norms + logit, 2: [], 3: norms, 4: logit, 5: [], 6: norms}
    assert len(lines[3]["layer_grad_norms"]) == config.model.layers + 2
    assert math.hypot(*lines[3]["layer_grad_norms"]) == pytest.approx(
        lines[3]["grad_norm"], rel=1e-4
    )

    every = replace(config, train=replace(config.train, speed_probe_every=50))
    with World(tmp_path, every, world_size=1) as world:
        world.begin(attempt="1.01", generation=2, checkpoint=checkpoint)
        world.finish()
        resumed = world.ranks[0].metrics
        assert [key for key in KEYS if resumed[5][key] is not None] == list(KEYS)
        assert (resumed[6]["loss"], resumed[6]["grad_norm"]) == (
            lines[6]["loss"],
            lines[6]["grad_norm"],
        )

    never = replace(
        config, train=replace(config.train, layer_norms_every=0, attention_logit_every=0)
    )
    with World(tmp_path, never, world_size=1) as world:
        world.begin(attempt="1.02", generation=3)
        world.finish()
        assert all(line[key] is None for line in world.ranks[0].metrics.values() for key in KEYS)
        assert {step: line["loss"] for step, line in world.ranks[0].metrics.items()} == {
            step: line["loss"] for step, line in lines.items()
        }
        assert tensors_in(world.commit(6)) == probed
