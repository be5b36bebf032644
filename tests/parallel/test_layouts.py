"""Every way to spread the work trains the same model: the curve, the gradients' norm and the
initial weights."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from tests.forms import FORMS, in_forms
from tests.parallel.layout_ranks import MODEL, STEPS, TIMEOUT_SECONDS, VALUES, digest, global_batch
from tests.train.rig import run_script

SCRIPT = Path(__file__).with_name("layout_ranks.py")
SHAPES = ((1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4))
"""Every (replicate, shard, tensor) of four ranks."""
CHECKPOINTING = ("none", "selective", "full")
ACCUMULATE = ("shards", "whole")
CASES = [
    (shape, mode, ACCUMULATE[(row + column) % 2], column == row % len(CHECKPOINTING))
    for row, shape in enumerate(SHAPES)
    for column, mode in enumerate(CHECKPOINTING)
]
"""Every shape with every mode; each shape and each mode also compiled, and with both ways to
accumulate gradients."""
PLAIN, COMPILED = ([case for case in CASES if case[-1] == compiled] for compiled in (False, True))
SHORT = [PLAIN[number] for number in (0, 3, 4, 7, 8, 11)]
"""Every shape once, each mode twice, gradients added up in both ways."""
SHORT_STEPS = 5
"""A wrong gradient shows in the first norm, a wrong update in the second loss. More show what adds
up, and that takes the whole form."""
STEPS_OF_FORMS = (SHORT_STEPS, pytest.param(STEPS, marks=pytest.mark.whole))
INDUCTOR = "torch._inductor.compile_fx"
RELEASED_350M = {"layer_norm": "post", "embed_dim": 32}


Case = tuple[Sequence[int], str, str, bool]


def name_of(shape: Sequence[int], mode: str, accumulate: str, compiled: bool) -> str:
    return f"{'x'.join(map(str, shape))} {mode} {accumulate}{' compiled' if compiled else ''}"


def run(
    folder: Path,
    world: int,
    cases: Sequence[Case],
    changes: dict[str, Any] | None = None,
    steps: int = STEPS,
) -> dict[str, Any]:
    """The curves of each case by its name."""
    named = [
        (
            name_of(*case),
            case[0],
            {"activation_checkpointing": case[1], "accumulate": case[2], "compile": case[3]},
            changes or {},
            steps,
        )
        for case in cases
    ]
    imports = [INDUCTOR] if any(case[-1] for case in cases) else []
    return run_script(
        SCRIPT, world, json.dumps(named), folder=folder, seconds=300, imports=imports
    )[0]


def textbook(changes: dict[str, Any]) -> dict[str, Any]:
    """Plain PyTorch in one process: the whole batch, the mean of its cross entropies, torch's
    clipping and AdamW."""
    config = replace(MODEL, **changes)
    model = OPT(config)
    initialise(model, config, 3)
    initial = {name: digest(parameter) for name, parameter in model.named_parameters()}
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
    losses, norms = [], []
    for step in range(STEPS):
        blocks = global_batch(step)
        loss = F.cross_entropy(model(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), VALUES["clip"]).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    return {"losses": losses, "norms": norms, "initial": initial}


def check_same(curves: dict[str, Any], reference: dict[str, Any], steps: int = STEPS) -> None:
    """Assert that the curves of so many steps begin, and go, as the reference's do."""
    assert curves["initial"].keys() == reference["initial"].keys()
    for name, sums in reference["initial"].items():
        assert curves["initial"][name] == pytest.approx(sums, rel=1e-12, abs=1e-12), name
    assert curves["losses"] == pytest.approx(reference["losses"][:steps], rel=0, abs=5e-6)
    assert curves["norms"] == pytest.approx(reference["norms"][:steps], rel=1e-5)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return textbook({})


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The curves of a form's layouts."""

    @functools.cache
    def of(form: str) -> dict[str, Any]:
        cases, steps = (SHORT, SHORT_STEPS) if form == "short" else (PLAIN, STEPS)
        return run(tmp_path_factory.mktemp("layouts"), 4, cases, steps=steps)

    return of


@pytest.fixture(scope="module")
def four_ranks_compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("compiled"), 4, COMPILED)


@pytest.mark.parametrize(
    ("form", "steps", "name"),
    in_forms(
        [(SHORT_STEPS, name_of(*case)) for case in SHORT],
        [(STEPS, name_of(*case)) for case in PLAIN],
    ),
)
def test_layout_follows_the_textbook(
    form: str,
    steps: int,
    name: str,
    four_ranks: Callable[[str], dict[str, Any]],
    reference: dict[str, Any],
) -> None:
    check_same(four_ranks(form)[name], reference, steps)


@pytest.mark.whole
@pytest.mark.parametrize("name", [name_of(*case) for case in COMPILED])
def test_compiled_layout_follows_the_textbook(
    name: str, four_ranks_compiled: dict[str, Any], reference: dict[str, Any]
) -> None:
    check_same(four_ranks_compiled[name], reference)


@pytest.mark.parametrize("form", FORMS)
def test_every_group_waits_as_long_as_the_world(
    form: str, four_ranks: Callable[[str], dict[str, Any]]
) -> None:
    """torch's own half an hour would leave ranks waiting within a tensor group for one that
    hangs."""
    for curves in four_ranks(form).values():
        assert set(curves["timeouts"]) == {TIMEOUT_SECONDS}


@pytest.mark.parametrize("steps", STEPS_OF_FORMS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_same_global_batch_on_fewer_ranks(
    world: int, steps: int, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """Eight sequences do not divide by three: two ranks get three, one gets two and padding that
    weighs nothing."""
    case = ((1, world, 1), "none", "shards", False)
    (curves,) = run(tmp_path, world, [case], steps=steps).values()
    check_same(curves, reference, steps)


@pytest.mark.parametrize("steps", STEPS_OF_FORMS)
def test_released_350m_variant_is_split_too(steps: int, tmp_path: Path) -> None:
    """Post-LayerNorm and a projected embedding over a tensor group."""
    case = ((1, 2, 2), "full", "shards", False)
    (curves,) = run(tmp_path, 4, [case], RELEASED_350M, steps).values()
    check_same(curves, textbook(RELEASED_350M), steps)
