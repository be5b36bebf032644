"""The engine on fairscale trains as the textbook and FSDP2 do, skips as one, and shares its
checkpoints.

Real ranks over gloo; `fairscale_on_cpu.py` stands in for the streams of a GPU.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config import checks as config_checks
from opt_train.config.compose import compose
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.exits import BadInput
from opt_train.protocol.facts import Validation
from tests.forms import FORMS, in_forms
from tests.parallel.fairscale_ranks import NARROW
from tests.parallel.layout_ranks import GLOBAL_BATCH, STEPS
from tests.parallel.test_layouts import INDUCTOR, SHORT_STEPS, check_same, textbook
from tests.train.rig import ROOT, World, run_script, tensors_in, tiny_config

SCRIPT = ROOT / "tests/parallel/fairscale_ranks.py"
WAYS = ["shards", "whole"]
NARROW_STEPS = 10
OVERFLOWING = ["fp32", "fp16", "memory-efficient fp16"]
EXCHANGED = ["fp32", "memory-efficient fp16"]
EVALUATED = ["fp32", "bf16"]
UNEVEN = [("bf16", "shards"), ("memory-efficient fp16", "shards")]
SHORT_NARROW = [("bf16", "shards"), ("fp16", "whole")]

Parts = dict[str, dict[str, Any]]
WHOLE: dict[int, Parts] = {
    2: {
        "textbook": {"ways": WAYS, "steps": STEPS},
        "beside_fsdp2": {
            "cases": [(name, way) for name in NARROW for way in WAYS],
            "steps": NARROW_STEPS,
        },
        "overflow": {"precisions": OVERFLOWING},
        "exchange": {"precisions": EXCHANGED},
        "evaluated": {"precisions": EVALUATED},
        "hooks": {"precisions": ["fp32", "bf16", "memory-efficient fp16"]},
        "waits": {},
        "layer_norms": {},
    },
    3: {
        "textbook": {"ways": WAYS, "steps": STEPS},
        "beside_fsdp2": {"cases": UNEVEN, "steps": NARROW_STEPS},
        "overflow": {"precisions": OVERFLOWING},
        "exchanged_elsewhere": {"precisions": EXCHANGED},
        "layer_norms": {},
    },
}
"""Parts by world size, with their arguments. Three ranks divide neither batch nor parameters
evenly."""
SHORT: dict[int, Parts] = {
    2: {
        "textbook": {"ways": WAYS, "steps": SHORT_STEPS},
        "beside_fsdp2": {"cases": SHORT_NARROW, "steps": SHORT_STEPS},
        "overflow": {"precisions": ["memory-efficient fp16"]},
        "exchange": {"precisions": ["memory-efficient fp16"]},
        "evaluated": {"precisions": ["bf16"]},
        "hooks": {"precisions": ["memory-efficient fp16"]},
        "waits": {},
        "layer_norms": {},
    },
    3: {
        "textbook": {"ways": ["shards"], "steps": SHORT_STEPS},
        "exchanged_elsewhere": {"precisions": ["memory-efficient fp16"]},
        "layer_norms": {},
    },
}

Reports = dict[int, list[dict[str, Any]]]
ReportsOf = Callable[[str], Reports]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ReportsOf:
    """What each rank found, by form and world size. The three ranks read checkpoints of the two."""

    @functools.cache
    def of(form: str) -> Reports:
        folder = tmp_path_factory.mktemp("fairscale")
        return {
            world: run_script(
                SCRIPT, world, json.dumps(parts), str(folder), folder=folder, seconds=380
            )
            for world, parts in (SHORT if form == "short" else WHOLE).items()
        }

    return of


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return textbook({})


@pytest.mark.parametrize(
    ("form", "steps", "world", "accumulate"),
    in_forms(
        [(SHORT_STEPS, 2, "shards"), (SHORT_STEPS, 2, "whole"), (SHORT_STEPS, 3, "shards")],
        [(STEPS, world, way) for world in (2, 3) for way in WAYS],
    ),
)
def test_follows_the_textbook(
    reports: ReportsOf,
    reference: dict[str, Any],
    form: str,
    steps: int,
    world: int,
    accumulate: str,
) -> None:
    check_same(reports(form)[world][0]["textbook"][accumulate], reference, steps)


@pytest.mark.parametrize(
    ("form", "precision", "accumulate"),
    in_forms(SHORT_NARROW, [(name, way) for name in NARROW for way in WAYS]),
)
def test_is_fsdp2_in_every_precision(
    reports: ReportsOf, form: str, precision: str, accumulate: str
) -> None:
    """To the bit on two ranks, but for micro-batches that fairscale adds up in fp16 where FSDP2
    does in fp32."""
    both = reports(form)[2][0]["beside_fsdp2"][f"{precision} {accumulate}"]
    if (precision, accumulate) == ("memory-efficient fp16", "whole"):
        assert both["fairscale"]["losses"] == pytest.approx(both["fsdp2"]["losses"], abs=1e-4)
        assert both["fairscale"]["norms"] == pytest.approx(both["fsdp2"]["norms"], rel=1e-3)
        assert both["fairscale"]["skips"] == both["fsdp2"]["skips"]
    else:
        assert both["fairscale"] == both["fsdp2"]
    overflows = sum(both["fairscale"]["skips"])
    assert (
        0 < overflows < len(both["fairscale"]["skips"])
        if precision == "overflowing fp16"
        else overflows == 0
    )
    assert both["fairscale"]["losses"][-1] < both["fairscale"]["losses"][0] - 0.03 or overflows


@pytest.mark.whole
@pytest.mark.parametrize(("precision", "accumulate"), UNEVEN)
def test_is_near_fsdp2_where_sums_round_otherwise(
    reports: ReportsOf, precision: str, accumulate: str
) -> None:
    both = reports("whole")[3][0]["beside_fsdp2"][f"{precision} {accumulate}"]
    assert both["fairscale"]["losses"] == pytest.approx(both["fsdp2"]["losses"], abs=2e-4)
    assert both["fairscale"]["norms"] == pytest.approx(both["fsdp2"]["norms"], rel=1e-3)


@pytest.mark.parametrize(
    ("form", "world", "precision"),
    in_forms(
        [(2, "memory-efficient fp16")], [(world, name) for world in (2, 3) for name in OVERFLOWING]
    ),
)
def test_overflow_on_any_rank_skips_on_all(
    reports: ReportsOf, form: str, world: int, precision: str
) -> None:
    answers = [answer["overflow"][precision] for answer in reports(form)[world]]
    overflows = 2 * world
    for answer in answers:
        assert answer["skips"] == [1.0] * overflows
        assert answer["untouched"] == [True] * overflows
        assert answer["scale"] == (1.0 if precision == "fp32" else 64.0 / 2.0**overflows)
        assert answer["then"]["skip"] == 0.0
        assert answer["then"]["changed"]
        assert answer["norm"] == answers[0]["norm"] == pytest.approx(answer["by_hand"], rel=1e-5)
        assert answer["then"]["norm"] == answers[0]["then"]["norm"]


@pytest.mark.parametrize(("form", "precision"), in_forms(["memory-efficient fp16"], EXCHANGED))
def test_checkpoints_go_to_fsdp2_and_back(reports: ReportsOf, form: str, precision: str) -> None:
    """And what fairscale has gathered for an evaluation is no longer what it trains with after a
    restore."""
    first, second, third = reports(form)[2][0]["exchange"][precision].values()
    state, losses = first
    assert (
        [shape for shape, _, _ in state.values()].count([])
        == sum(".step" in name for name in state)
        > 10
    )
    assert second == [state, losses]
    assert third == [state, losses]


@pytest.mark.parametrize(("form", "precision"), in_forms(["memory-efficient fp16"], EXCHANGED))
def test_checkpoints_go_to_another_number_of_ranks(
    reports: ReportsOf, form: str, precision: str
) -> None:
    found = reports(form)
    state, curve = found[2][0]["exchange"][precision]["fsdp2"]
    for its_state, its_curve in found[3][0]["exchanged_elsewhere"][precision].values():
        assert its_state == state
        assert its_curve["losses"] == pytest.approx(
            curve["losses"], abs=5e-6 if precision == "fp32" else 2e-4
        )


@pytest.mark.parametrize(("form", "precision"), in_forms(["bf16"], EVALUATED))
def test_an_evaluation_changes_nothing(reports: ReportsOf, form: str, precision: str) -> None:
    found = reports(form)[2][0]["evaluated"][precision]
    assert found["disturbed"] == found["undisturbed"]
    assert found["evaluations"][-1] == found["reference"] < found["evaluations"][0]


@pytest.mark.parametrize("form", FORMS)
def test_hooks_do_not_pile_up(reports: ReportsOf, form: str) -> None:
    """fairscale alone runs one more of its hooks for each parameter after every forward pass, for
    ever."""
    micro_batches, parameters = GLOBAL_BATCH // 2 // 2, 2 * 16 + 4
    for calls in reports(form)[2][0]["hooks"].values():
        assert calls == [micro_batches * parameters] * 4


@pytest.mark.parametrize("form", FORMS)
def test_a_step_never_waits_for_the_device(reports: ReportsOf, form: str) -> None:
    assert list(reports(form)[2][0]["waits"].values()) == [[], []]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_norms_of_layers_are_fsdp2s(reports: ReportsOf, form: str, world: int) -> None:
    found = reports(form)[world][0]["layer_norms"]
    for mine, reference in zip(found["fairscale"], found["fsdp2"], strict=True):
        assert mine == pytest.approx(reference, rel=1e-5)


@pytest.mark.whole
def test_recomputing_and_compiling_change_nothing(tmp_path: Path) -> None:
    (curves, *_) = (
        found["recomputed"]
        for found in run_script(
            SCRIPT,
            2,
            json.dumps({"recomputed": {}}),
            str(tmp_path),
            folder=tmp_path,
            seconds=380,
            imports=[INDUCTOR],
        )
    )
    kept = curves.pop("none")
    assert len(curves) == 5
    for name, curve in curves.items():
        if "compiled" in name:
            assert curve["losses"] == pytest.approx(kept["losses"], abs=1e-3), name
            assert curve["norms"] == pytest.approx(kept["norms"], rel=1e-2), name
        else:
            assert curve == kept, name


@pytest.mark.slow
def test_a_run_saves_and_resumes(tmp_path: Path) -> None:
    """The real trainer: it validates and saves, is killed, goes on from there to the bit, and with
    FSDP2 nearly so."""
    config = replace(
        tiny_config(tmp_path, steps=8, validate_every=2),
        parallel=ParallelConfig(engine="fairscale"),
        precision=PrecisionConfig(compute="bf16"),
        checkpoint=CheckpointConfig(every_steps=4),
    )
    reports = []
    checkpoint = None
    for name, engine in (("whole", "fairscale"), ("resumed", "fairscale"), ("by fsdp2", "fsdp2")):
        (folder := tmp_path / name).mkdir()
        config = replace(config, parallel=replace(config.parallel, engine=engine))
        with World(folder, config, module="tests.parallel.fairscale_rank") as world:
            world.begin(checkpoint=checkpoint)
            assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
            metrics = {
                step: (line["loss"], line["grad_norm"])
                for step, line in world.ranks[0].metrics.items()
            }
            validations = [fact.loss for fact in world.ranks[0].published(Validation)]
            reports.append((metrics, validations[-2:], tensors_in(world.commit(8))))
            checkpoint = checkpoint or world.commit(4)
            assert "Warning" not in world.logs()
    whole, resumed, by_fsdp2 = reports
    assert sorted(whole[0]) == list(range(1, 9))
    assert whole[0][8][0] < whole[0][1][0]
    for step in range(5, 9):
        assert resumed[0][step] == whole[0][step]
        assert by_fsdp2[0][step] == pytest.approx(whole[0][step], abs=2e-4)
    assert resumed[1:] == whole[1:]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["parallel.tensor=2", "cluster.nodes=2"],
            "parallel.engine=fairscale shards over all ranks and knows no parallel.tensor=2; use "
            "parallel.tensor=1, or "
            "parallel.engine=fsdp2",
        ),
        (
            ["parallel.replicate=2", "cluster.nodes=2"],
            "parallel.engine=fairscale shards over all ranks and knows no parallel.replicate=2; "
            "use parallel.replicate=1, "
            "or parallel.engine=fsdp2",
        ),
        (
            ["optim.fused=apex"],
            "parallel.engine=fairscale updates with torch's AdamW, not optim.fused=apex; use "
            "optim.fused=auto",
        ),
        (
            ["train.device=cpu"],
            "parallel.engine=fairscale needs GPUs, and train.device=cpu has none; use "
            "parallel.engine=fsdp2",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose(["parallel.engine=fairscale", *overrides])
    assert str(refused.value) == expected


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = config_checks.importlib.util.find_spec
    monkeypatch.setattr(
        config_checks.importlib.util,
        "find_spec",
        lambda name: None if name == "fairscale" else find_spec(name),
    )
    with pytest.raises(
        BadInput,
        match=r"parallel.engine=fairscale is not installed; pip install 'opt-train\[fairscale\]'",
    ):
        compose(["parallel.engine=fairscale"])
