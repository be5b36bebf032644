"""The engine on DeepSpeed's ZeRO trains as the textbook and FSDP2 do, skips as one, and shares its
checkpoints.

Real ranks over gloo. Each case is one set of processes, because DeepSpeed has one engine a process.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config import checks as config_checks
from opt_train.config.compose import compose
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.exits import BadInput
from opt_train.protocol.facts import Validation
from tests.forms import in_forms
from tests.parallel.deepspeed_ranks import TIMEOUT
from tests.parallel.layout_ranks import STEPS, VALUES
from tests.parallel.test_layouts import check_same, textbook
from tests.train.rig import ROOT, World, run_script, tensors_in, tiny_config

SCRIPT = ROOT / "tests/parallel/deepspeed_ranks.py"
TOLERANCE = {"fp32": 5e-6, "bf16": 3e-4}
"""Of losses of engines that sum in other orders. In bf16 stage 3 also rounds a product before it
adds the bias."""


@dataclass(frozen=True, kw_only=True)
class Case:
    stage: int
    world: int
    compute: str = "fp32"
    ways: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    """Of DeepSpeed's settings."""


SPARING = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 20_000,
}
"""Nothing is kept whole that need not be, and AdamW's partitions are several, as they are of a
model that is large."""
CASES = {
    "stage 1": Case(
        stage=1, world=2, ways={"activation_checkpointing": "selective", "accumulate": "whole"}
    ),
    "stage 2 on three": Case(stage=2, world=3, ways={"activation_checkpointing": "full"}),
    "stage 3": Case(stage=3, world=2),
    "stage 3 sparing": Case(
        stage=3, world=2, ways={"activation_checkpointing": "full"}, zero=SPARING
    ),
    "stage 3 on three": Case(
        stage=3, world=3, ways={"activation_checkpointing": "selective"}, zero=SPARING
    ),
    "stage 1 bf16": Case(stage=1, world=2, compute="bf16"),
    "stage 2 bf16": Case(stage=2, world=2, compute="bf16"),
    "stage 3 bf16": Case(stage=3, world=2, compute="bf16"),
}
"""Three ranks divide neither batch nor parameters evenly."""
FP32 = [name for name, case in CASES.items() if case.compute == "fp32"]
SHORT = ("stage 1", "stage 3", "stage 2 bf16")

Reports = dict[str, list[dict[str, Any]]]
ReportsOf = Callable[[str], Reports]


def run(folder: Path, engine: str, case: Case, parts: str, **named: Any) -> list[dict[str, Any]]:
    """What each rank of a case found."""
    sent = {"engine": engine, "stage": case.stage, "parts": parts.split(), **named}
    sent |= {"compute": case.compute, "ways": case.ways, "zero": case.zero}
    return run_script(
        SCRIPT,
        case.world,
        json.dumps(sent),
        str(folder),
        folder=folder,
        seconds=300,
        imports=["tests.parallel.deepspeed_imports"] if engine == "deepspeed" else [],
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ReportsOf:
    """What each rank of each case found, by form."""

    @functools.cache
    def of(form: str) -> Reports:
        names = SHORT if form == "short" else tuple(CASES)
        return run_together(tmp_path_factory.mktemp("deepspeed"), names)

    return of


def run_together(folder: Path, names: Sequence[str]) -> Reports:
    """What each rank of these cases found; FSDP2's by its precision. Checkpoints go from FSDP2 to
    each case and back."""
    found = {"fp32": run(folder, "fsdp2", Case(stage=3, world=2), "curve layers first_of_exchange")}
    bf16 = Case(stage=3, world=2, compute="bf16")
    found["bf16"] = run(folder, "fsdp2", bf16, "curve layers exchange", **{"from": ["first"]})
    for name in names:
        case, parts = CASES[name], "curve layers waits overflow overflow_in_forward exchange"
        found[name] = run(folder, "deepspeed", case, parts, **{"from": ["first"], "as": name})
    found["back"] = run(
        folder, "fsdp2", Case(stage=3, world=2), "exchange", **{"from": list(names)}
    )
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return textbook({})


@pytest.mark.parametrize(("form", "name"), in_forms([name for name in SHORT if name in FP32], FP32))
def test_follows_the_textbook(
    reports: ReportsOf, reference: dict[str, Any], form: str, name: str
) -> None:
    """With two micro-batches and one in turn."""
    check_same(reports(form)[name][0]["curve"], reference)


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_is_near_fsdp2_in_its_precision(reports: ReportsOf, form: str, name: str) -> None:
    compute = CASES[name].compute
    found, expected = (reports(form)[which][0]["curve"] for which in (name, compute))
    assert found["initial"].keys() == expected["initial"].keys()
    for parameter, sums in expected["initial"].items():
        assert found["initial"][parameter] == pytest.approx(sums, rel=1e-12, abs=1e-12), parameter
    assert found["losses"] == pytest.approx(expected["losses"], rel=0, abs=TOLERANCE[compute])
    assert found["norms"] == pytest.approx(
        expected["norms"], rel=1e-5 if compute == "fp32" else 2e-3
    )
    assert found["evaluation"] == pytest.approx(
        expected["evaluation"], rel=0, abs=TOLERANCE[compute]
    )
    assert found["evaluation"] < found["losses"][0]


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_what_is_in_force_is_read_back(reports: ReportsOf, form: str, name: str) -> None:
    in_force = reports(form)[name][0]["curve"]["in_force"]
    assert in_force == {key: value for key, value in VALUES.items() if key != "clip"} | {
        "updates": STEPS
    }


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_norms_of_layers_are_fsdp2s(reports: ReportsOf, form: str, name: str) -> None:
    compute = CASES[name].compute
    found, expected = (reports(form)[which][0]["layers"] for which in (name, compute))
    tolerance = 1e-4 if compute == "fp32" else 1e-2
    for mine, theirs in zip(found["squares"], expected["squares"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    assert sum(found["squares"][0]) == pytest.approx(found["norm"] ** 2, rel=1e-5)
    assert found["embedding"] == pytest.approx(found["squares"][0][0], rel=1e-6)
    # Half of it is a quarter of its square.
    halved = found["norm"] ** 2 - 0.75 * found["embedding"]
    assert found["halved"] ** 2 == pytest.approx(halved, rel=1e-5)


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_the_host_waits_for_nothing(reports: ReportsOf, form: str, name: str) -> None:
    """But in stage 3 for a number that it has itself, and for collectives no longer than the
    trainer says."""
    for answer in (rank["waits"] for rank in reports(form)[name]):
        assert len(answer["seen"]) == (1 if CASES[name].stage == 3 else 0)
        assert answer["timeouts"] == [TIMEOUT]


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_overflow_on_any_rank_skips_on_all(reports: ReportsOf, form: str, name: str) -> None:
    for answer in (rank["overflow"] for rank in reports(form)[name]):
        turns = 2 * CASES[name].world
        assert answer["skips"] == [1.0] * turns
        assert answer["untouched"] == [True] * turns
        assert answer["updates"] == [STEPS + 2] * turns
        assert answer["then"]["skip"] == 0.0
        assert answer["then"]["changed"]
        assert answer["then"]["norm"] == reports(form)[name][0]["overflow"]["then"]["norm"]


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_overflow_that_deepspeed_sums_skips_on_all(
    reports: ReportsOf, form: str, name: str
) -> None:
    for answer in (rank["overflow_in_forward"] for rank in reports(form)[name]):
        assert answer["found"] == [[1.0, True]] * CASES[name].world
        assert 0 < answer["norm after"][0] < 100


@pytest.mark.parametrize(("form", "name"), in_forms(SHORT, CASES))
def test_checkpoints_go_from_fsdp2_and_back(reports: ReportsOf, form: str, name: str) -> None:
    """To the bit, between two ranks and three."""
    first = reports(form)["fp32"][0]["first_of_exchange"]
    state, compute = first["state"], CASES[name].compute
    assert (
        [shape for shape, _, _ in state.values()].count([])
        == sum(".step" in key for key in state)
        > 10
    )
    there, back = (
        reports(form)[name][0]["exchange"]["first"],
        reports(form)["back"][0]["exchange"][name],
    )
    assert there["state"] == back["state"] == state
    assert there["updates"] == back["updates"]
    assert back["curve"] == first["curve"]
    expected = (
        first["curve"]
        if compute == "fp32"
        else reports(form)["bf16"][0]["exchange"]["first"]["curve"]
    )
    assert there["curve"]["losses"] == pytest.approx(
        expected["losses"], rel=0, abs=TOLERANCE[compute]
    )


@pytest.mark.whole
def test_compiled_blocks_follow_the_textbook(tmp_path: Path, reference: dict[str, Any]) -> None:
    check_same(
        run(tmp_path, "deepspeed", Case(stage=2, world=2, ways={"compile": True}), "curve")[0][
            "curve"
        ],
        reference,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_saves_and_resumes(tmp_path: Path, stage: int) -> None:
    """The real trainer: it validates and saves, is started anew from there, and goes on to the
    bit."""
    config = replace(
        tiny_config(tmp_path, steps=6, validate_every=2),
        parallel=ParallelConfig(engine="deepspeed", zero_stage=stage),
        precision=PrecisionConfig(compute="bf16"),
        checkpoint=CheckpointConfig(every_steps=3),
    )
    reports = []
    checkpoint = None
    for name in ("whole", "resumed"):
        (folder := tmp_path / name).mkdir()
        with World(folder, config, module="tests.parallel.deepspeed_rank") as world:
            world.begin(checkpoint=checkpoint)
            assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
            metrics = {
                step: (line["loss"], line["grad_norm"])
                for step, line in world.ranks[0].metrics.items()
            }
            validations = [fact.loss for fact in world.ranks[0].published(Validation)]
            reports.append((metrics, validations[-2:], tensors_in(world.commit(6))))
            checkpoint = checkpoint or world.commit(3)
            assert "DeepSpeed" not in world.logs()
            assert "warning" not in world.logs().lower()
    whole, resumed = reports
    assert sorted(whole[0]) == list(range(1, 7))
    assert whole[0][6][0] < whole[0][1][0]
    assert resumed == ({step: whole[0][step] for step in range(4, 7)}, *whole[1:])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["parallel.tensor=2", "cluster.nodes=2"],
            "parallel.engine=deepspeed shards over all ranks and knows no parallel.tensor=2; use "
            "parallel.tensor=1, or "
            "parallel.engine=fsdp2",
        ),
        (["parallel.zero_stage=4"], "parallel.zero_stage=4 is not possible; use 1, 2 or 3"),
        (
            ["precision.compute=fp16"],
            "parallel.engine=deepspeed computes in fp32 or bf16, not in precision.compute=fp16; "
            "use "
            "parallel.engine=fsdp2 or fairscale",
        ),
        (
            ["optim.fused=apex"],
            "parallel.engine=deepspeed updates with torch's AdamW, not optim.fused=apex; use "
            "optim.fused=auto",
        ),
        (
            ["parallel.compile=true"],
            "parallel.compile=true cannot look through the hooks that parallel.zero_stage=3 puts "
            "into each layer; use "
            "parallel.compile=false or parallel.zero_stage=2",
        ),
        (
            ["parallel.zero_stage=2", "parallel.accumulate=whole"],
            "parallel.accumulate=whole goes with parallel.zero_stage=1, because stage 2 sums over "
            "ranks after each "
            "micro-batch; use parallel.accumulate=shards",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose(["parallel.engine=deepspeed", *overrides])
    assert str(refused.value) == expected


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = config_checks.importlib.util.find_spec
    monkeypatch.setattr(
        config_checks.importlib.util,
        "find_spec",
        lambda name: None if name == "deepspeed" else find_spec(name),
    )
    with pytest.raises(
        BadInput,
        match=r"parallel.engine=deepspeed is not installed; pip install 'opt-train\[deepspeed\]'",
    ):
        compose(["parallel.engine=deepspeed"])
