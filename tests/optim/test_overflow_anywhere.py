"""An overflow on any one rank is everybody's: the trap is torch.amp.GradScaler's, whose
tensor-parallel ranks disagree.

Real ranks; `overflow_ranks.py` plants an inf and a NaN on each of them in turn.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_train.parallel.layout import Layout
from tests.forms import in_forms
from tests.train.rig import ROOT, run_script

FP16: dict[str, Any] = {"compute": "fp16", "loss_scale_initial": 64.0}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"compute": "fp32"},
    "fp16": FP16,
    "memory-efficient fp16": {**FP16, "weights": "fp16"},
}
LAYOUTS = (Layout(1, 2, 1), Layout(1, 4, 1), Layout(2, 2, 1), Layout(1, 1, 2), Layout(1, 2, 2))
"""Sharded, with copies, and with tensor groups, on two and four ranks."""
Case = tuple[Layout, str]
WHOLE: list[Case] = [(layout, name) for layout in LAYOUTS for name in PRECISIONS]
SHORT: list[Case] = [
    (LAYOUTS[0], "fp32"),
    (LAYOUTS[3], "memory-efficient fp16"),
    (LAYOUTS[2], "memory-efficient fp16"),
    (LAYOUTS[4], "fp16"),
]
"""Every kind of layout, each with some precision, and every precision."""


def expected_scales(name: str, overflows: int) -> list[float]:
    """By hand: each overflow halves it."""
    return [1.0 if name == "fp32" else 64.0 / 2.0**number for number in range(1, overflows + 1)]


Reports = dict[Case, list[dict[str, Any]]]
ReportsOf = Callable[[str], Reports]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ReportsOf:
    """What each rank of each case saw, by form; one set of processes for each world size."""

    @functools.cache
    def of(form: str) -> Reports:
        found: Reports = {}
        for world_size in sorted({layout.world_size for layout in LAYOUTS}):
            cases = [
                (layout, name)
                for layout, name in (SHORT if form == "short" else WHOLE)
                if layout.world_size == world_size
            ]
            sent = [
                ([layout.replicate, layout.shard, layout.tensor], PRECISIONS[name])
                for layout, name in cases
            ]
            script = Path(ROOT / "tests/optim/overflow_ranks.py")
            answers: list[Any] = run_script(
                script, world_size, json.dumps(sent), folder=tmp_path_factory.mktemp("ranks")
            )
            for number, case in enumerate(cases):
                found[case] = [answer[number] for answer in answers]
        return found

    return of


def named(value: Any) -> Any:
    return f"{value.replicate}x{value.shard}x{value.tensor}" if isinstance(value, Layout) else value


@pytest.mark.parametrize(("form", "layout", "precision"), in_forms(SHORT, WHOLE), ids=named)
def test_overflow_on_any_rank_skips_on_all(
    reports: ReportsOf, form: str, layout: Layout, precision: str
) -> None:
    answers = reports(form)[layout, precision]
    overflows = 2 * layout.world_size
    for answer in answers:
        assert answer["skips"] == [1.0] * overflows
        assert answer["untouched"] == [True] * overflows
        assert answer["scales"] == expected_scales(precision, overflows)
        assert answer["then"]["skip"] == 0.0
        assert answer["then"]["changed"]
        assert answer["norms"] == answers[0]["norms"]
        assert answer["then"]["norm"] == answers[0]["then"]["norm"]


@pytest.mark.parametrize(("form", "layout", "precision"), in_forms(SHORT, WHOLE), ids=named)
def test_norm_counts_every_element_once_whatever_holds_it(
    reports: ReportsOf, form: str, layout: Layout, precision: str
) -> None:
    found = reports(form)[layout, precision][0]
    assert found["norms"] == pytest.approx(found["by_hand"], rel=1e-5)
    # And without the loss scale it is the same for all.
    assert found["norms"][0] == pytest.approx(
        reports(form)[LAYOUTS[0], "fp32"][0]["norms"][0], rel=1e-2
    )
