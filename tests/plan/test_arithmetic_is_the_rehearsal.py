"""The plan's arithmetic must not drift from what the code allocates and sends.

Three layers stand for all here. `opt-train plan --multirun 'experiment=glob(opt-*)' --rehearse`
compares every size in full, in some five minutes of a free core.
"""

from dataclasses import replace
from typing import Any

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.plan.comparison import (
    Comparison,
    compare_collectives,
    compare_memory,
    reason_for_difference,
)
from opt_train.plan.memory import MODES
from tests.plan.presets import SIZES, planned, recipe, rehearsed, with_layers

ALONE = ("cluster.nodes=1", "cluster.slots_per_node=1")

VARIANTS = {
    **{size: recipe(size) for size in SIZES},
    "gradients of many micro-batches added in shards": recipe("175b", "train.micro_batch=2"),
    "gradients of many micro-batches added whole": recipe(
        "175b", "train.micro_batch=2", "parallel.accumulate=whole"
    ),
    "replicas in fp16": recipe(
        "6.7b", "parallel.replicate=4", "train.micro_batch=4", "precision=fp16-memory-efficient"
    ),
    "replicas that add whole": recipe(
        "6.7b", "parallel.replicate=4", "train.micro_batch=4", "parallel.accumulate=whole"
    ),
    "fp32 on one node": recipe("125m", "precision=fp32", "train.micro_batch=4"),
    "alone": recipe("125m", "precision=fp32", *ALONE, "train.micro_batch=256"),
    "alone, many micro-batches": recipe("125m", "precision=fp32", *ALONE),
    "alone in fp16": recipe("350m", "precision=fp16-memory-efficient", *ALONE),
    "alone with fp32 weights": recipe("125m", *ALONE),
    "fp32 over tensor groups": recipe(
        "1.3b", "precision=fp32", "train.micro_batch=4", "parallel.tensor=4"
    ),
    "eager blocks": recipe("125m", "parallel.compile=false"),
    "no dropout": recipe("66b", "model.dropout=0"),
    "no dropout, norms behind": recipe(
        "6.7b", "model.dropout=0", "model.layer_norm=post", "parallel.tensor=4"
    ),
    "little but embeddings": recipe(
        "125m",
        "precision=fp32",
        "data.sequence_length=256",
        "train.global_batch=16",
        "train.micro_batch=1",
    ),
    "an embedding of another width, split": recipe("350m", "parallel.tensor=2"),
}


def in_mode(config: RunConfig, mode: str) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, activation_checkpointing=mode))


CASES = [pytest.param(name, mode, marks=pytest.mark.whole) for name in VARIANTS for mode in MODES]
"""tests/cli/test_plan.py compares a smaller model in every mode."""


@pytest.fixture(scope="module")
def rehearsals(request: pytest.FixtureRequest) -> dict[tuple[str, str], dict[str, Any]]:
    """Of what the chosen tests ask for, all at once."""
    chosen = [item for item in request.session.items if item.path == request.path]
    asked = [getattr(item, "callspec", None) for item in chosen]
    keys = sorted({(spec.params["name"], spec.params["mode"]) for spec in asked if spec})
    answers = rehearsed(
        [with_layers(in_mode(VARIANTS[name], mode), 3) for name, mode in keys], seconds=580
    )
    return dict(zip(keys, answers, strict=True))


def rows(name: str, mode: str, rehearsal: dict[str, Any]) -> list[Comparison]:
    plan = planned(with_layers(in_mode(VARIANTS[name], mode), 3))
    return compare_memory(plan.configured, rehearsal) + compare_collectives(
        plan.collectives, rehearsal
    )


@pytest.mark.parametrize(
    ("name", "mode"), [case for case in CASES if "another width, split" not in case.values[0]]
)
def test_no_figure_differs_by_five_percent(name: str, mode: str, rehearsals: Any) -> None:
    differing = [row for row in rows(name, mode, rehearsals[name, mode]) if not row.agrees]
    assert differing == []


@pytest.mark.parametrize(
    ("name", "mode"), [case for case in CASES if "another width, split" in case.values[0]]
)
def test_what_a_cpu_does_in_another_way_is_told_with_its_reason(
    name: str, mode: str, rehearsals: Any
) -> None:
    """torch's CPU group makes an all_to_all of all_gathers, and says so itself."""
    config = VARIANTS[name]
    differing = [row for row in rows(name, mode, rehearsals[name, mode]) if not row.agrees]
    assert {row.what.partition(",")[0] for row in differing} == {
        "all_gather over 2",
        "all_to_all over 2",
    }
    assert all("all_to_all" in reason_for_difference(row, config) for row in differing)
    assert all(row.rehearsed == 0 for row in differing if row.what.startswith("all_to_all"))


def test_a_difference_without_a_known_reason_is_not_explained_away() -> None:
    row = Comparison("peak", planned=2, rehearsed=1)
    assert not row.agrees
    assert "report" in reason_for_difference(row, recipe("175b"))
    assert "report" in reason_for_difference(row, recipe("350m", "parallel.tensor=2"))
    assert "report" in reason_for_difference(
        Comparison("all_gather over 8, bytes", planned=2, rehearsed=1), recipe("175b")
    )


@pytest.mark.whole
def test_parameters_are_those_of_the_model_that_is_built(rehearsals: Any) -> None:
    for (name, _), rehearsal in rehearsals.items():
        assert planned(with_layers(VARIANTS[name], 3)).parameters == rehearsal["parameters"]
