"""Each sickness does to a real rank what its name says, at its step and not before."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.stability.outcomes import Result
from benchmarks.stability.running import Runner
from benchmarks.stability.settings import BASES, OURS, TUNING, Run, as_json
from benchmarks.stability.sicknesses import FOR_GOOD, INJECTIONS, Struck
from tests.train.rig import World, tiny_config

STEPS, FIRST = 9, 5
Lines = dict[int, dict[str, Any]]


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, sickness: dict[str, Any]) -> Lines:
    folder.mkdir()
    monkeypatch.setenv("SICK", json.dumps({"sickness": sickness}))
    monkeypatch.setenv("SICK_FOLDER", str(folder))
    config = tiny_config(folder, steps=STEPS, layer_norms_every=1)
    config = replace(config, model=replace(config.model, dropout=0.0))
    with World(folder, config, 1, module="benchmarks.stability.sick_rank") as world:
        world.begin()
        assert [leaving.code for leaving in world.finish()] == [0]
        return world.ranks[0].metrics


def rate(sick: Lines, well: Lines) -> None:
    assert sick[6]["loss"] == well[6]["loss"]
    # What the update of the first sick step has changed stands in the next line.
    assert sick[7]["update_ratio"] == pytest.approx(30 * well[7]["update_ratio"], rel=1e-3)


def gradient_times(sick: Lines, well: Lines) -> None:
    embedding, *others = sick[6]["layer_grad_norms"]
    embedding_well, *others_well = well[6]["layer_grad_norms"]
    assert embedding == pytest.approx(100 * embedding_well, rel=1e-3)
    assert others == others_well
    # It lasts for two steps.
    assert sick[7]["grad_norm"] > 10 * well[7]["grad_norm"]
    assert sick[8]["grad_norm"] < 10 * well[8]["grad_norm"]


def gradient_noise(sick: Lines, well: Lines) -> None:
    parameters = 2 * (4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 4 * 64)
    parameters += 512 * 64 + 66 * 64 + 2 * 64
    expected = math.sqrt(well[6]["grad_norm"] ** 2 + parameters * 0.1**2)
    assert sick[6]["grad_norm"] == pytest.approx(expected, rel=0.02)


def overflows(sick: Lines, _: Lines) -> None:
    assert [step for step, line in sick.items() if line["overflow"]] == [6, 7]


def second_moments(sick: Lines, well: Lines) -> None:
    assert sick[6]["grad_norm"] == well[6]["grad_norm"]
    assert sick[7]["update_ratio"] < well[7]["update_ratio"] / 100


def first_moments(sick: Lines, well: Lines) -> None:
    assert sick[6]["grad_norm"] == well[6]["grad_norm"]
    assert sick[7]["update_ratio"] > 20 * well[7]["update_ratio"]


def weight(sick: Lines, well: Lines) -> None:
    assert is_huge(sick[6]["layer_weight_norms"][1])
    assert sick[6]["layer_weight_norms"][2] == well[6]["layer_weight_norms"][2]


def moment(sick: Lines, well: Lines) -> None:
    assert sick[6]["layer_weight_norms"] == well[6]["layer_weight_norms"]
    assert is_huge(sick[7]["layer_weight_norms"][1])


def is_huge(norm: float | str) -> bool:
    """Beyond 10^30; the square may have been infinite."""
    return float(norm) > 1e30


def multiply(sick: Lines, well: Lines) -> None:
    assert sick[6]["layer_weight_norms"][2] == 0.0
    assert sick[6]["layer_weight_norms"][:2] == well[6]["layer_weight_norms"][:2]


def rescale(sick: Lines, well: Lines) -> None:
    assert sick[6]["loss"] == pytest.approx(well[6]["loss"], rel=1e-5)
    assert sick[6]["layer_weight_norms"][2] > 100 * well[6]["layer_weight_norms"][2]


def circle(sick: Lines, well: Lines) -> None:
    assert sick[6]["loss"] == well[6]["loss"]
    # The same batch again: it is known by now.
    assert sick[9]["loss"] < min(line["loss"] for line in well.values())


def garbage(sick: Lines, well: Lines) -> None:
    above = [sick[step]["loss"] - well[step]["loss"] for step in range(6, STEPS + 1)]
    assert all(difference > 0.2 for difference in above[:2])
    assert all(difference < 0.2 for difference in above[2:])


def row(check: Callable[[Lines, Lines], None], what: str, slow: bool = True, **more: Any) -> Any:
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(what, more, check, id=check.__name__, marks=marks)


ROWS = (
    row(rate, "rate", times=30.0, slow=False),
    row(gradient_times, "gradient_times", matches=["embed_"], times=100.0, steps=2, slow=False),
    row(gradient_noise, "gradient_noise", std=0.1),
    row(overflows, "overflows", steps=2),
    row(second_moments, "moments", second=1e6),
    row(first_moments, "moments", first_times=100.0),
    row(weight, "flip", of="weight", slow=False),
    row(moment, "flip", of="exp_avg"),
    row(multiply, "multiply", matches=["layers.1."], times=0.0),
    row(rescale, "rescale", layer=1, times=3e4),
    row(circle, "circle", batches=1),
    row(garbage, "batches", how="garbage", length=2),
)


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trained(tmp_path_factory.mktemp("well") / "run", monkeypatch, {})


@pytest.mark.parametrize(("what", "more", "check"), ROWS)
def test_a_sickness_does_what_its_name_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    well: Lines,
    what: str,
    more: dict[str, Any],
    check: Callable[[Lines, Lines], None],
) -> None:
    sick = trained(tmp_path / "run", monkeypatch, {"what": what, "first": FIRST, **more})
    for step in range(1, FIRST + 1):
        assert sick[step]["loss"] == well[step]["loss"]
        assert sick[step]["grad_norm"] == well[step]["grad_norm"]
    check(sick, well)


def test_every_sickness_is_tried() -> None:
    assert {row.values[0] for row in ROWS} == set(INJECTIONS)


def at_step(step: int) -> Any:
    return SimpleNamespace(state=SimpleNamespace(step=step))


def test_an_event_happens_once_whatever_is_trained_again(tmp_path: Path) -> None:
    struck = Struck({"first": 3, "steps": 2}, tmp_path)
    steps = [0, 1, 2, 3, 2, 3, 4]
    assert [struck.strikes(at_step(step)) for step in steps] == [False] * 3 + [True] + [False] * 3
    again = Struck({"first": 3, "steps": 2}, tmp_path)
    assert not any(again.strikes(at_step(step)) for step in steps)
    assert not again.lasts
    assert again.taken >= FOR_GOOD


def test_what_lasts_two_steps_lasts_two_and_what_is_for_good_begins_at_its_step(
    tmp_path: Path,
) -> None:
    short = Struck({"first": 3, "steps": 2}, tmp_path)
    lasting = []
    for step in (2, 3, 2, 3, 4):
        short.strikes(at_step(step))
        lasting.append(short.lasts)
    # Steps that were taken, not places in the run.
    assert lasting == [False, True, True, False, False]
    (tmp_path / "other").mkdir()
    for_good = Struck({"first": 3}, tmp_path / "other")
    lasting = []
    for step in (2, 3, 4, 2, 3):
        for_good.strikes(at_step(step))
        lasting.append(for_good.lasts)
    assert lasting == [False, True, True, False, True]


def test_a_result_that_is_kept_is_not_done_again(tmp_path: Path) -> None:
    run = Run(base=BASES[TUNING][0], steps=10, control=OURS)
    kept = Result(end="finished", validation=2.0, steps_taken=10, skipped=(("1.00", 7),))
    results = tmp_path / "results"
    results.mkdir()
    payload = {**as_json(run), "result": kept.to_json()}
    (results / f"{run.name}.json").write_text(json.dumps(payload))
    # Whoever started a run would need `opt-train prepare`, which leaves its data here.
    found = Runner(tmp_path, parallel=1).do([run], lambda *_: pytest.fail("it was done"))
    assert found == {run.name: kept}
    assert not (tmp_path / "data").exists()
