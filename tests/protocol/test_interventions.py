"""What a person may change of a run, and the orders that it becomes."""

from typing import Any

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.optim.config import OptimConfig
from opt_train.optim.in_force import in_force
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.exits import BadInput
from opt_train.protocol.interventions import INTERVENE, changes_of, orders_of
from opt_train.protocol.orders import (
    LedgerEntry,
    ScaleEmbeddingGradient,
    ScaleLr,
    SetClip,
    SetLossScale,
    SkipSamples,
)
from opt_train.train.config import TrainConfig


def message(**changes: Any) -> dict[str, Any]:
    return {"kind": INTERVENE, "by": "ada@n1", "why": "it climbs", "changes": changes}


def test_each_change_becomes_an_order_with_its_reason() -> None:
    why = "it climbs (by ada@n1)"
    assert orders_of(message(lr_scale=0.5, clip=0.3, skip_batches=4), 7, 16) == [
        ScaleLr(7, why, 0.5),
        SetClip(8, why, 0.3),
        SkipSamples(9, why, 64),
    ]


def test_scales_become_orders() -> None:
    why = "it climbs (by ada@n1)"
    changes = {"loss_scale": 256.0, "loss_scale_floor": 0.03125, "embedding_gradient": 0.1}
    assert orders_of(message(**changes), 3, 16) == [
        SetLossScale(3, why, scale=256.0),
        SetLossScale(4, why, floor=0.03125),
        ScaleEmbeddingGradient(5, why, 0.1),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.5},
        {"lr_scale": 0},
        {"lr_scale": -1},
        {"lr_scale": "0.5"},
        {"lr_scale": True},
        {"lr_scale": float("nan")},
        {"skip_batches": 1.5},
        {"loss_scale": 100.0},
        {"loss_scale_floor": 0.3},
        {"embedding_gradient": 0},
        None,
    ],
)
def test_what_was_written_by_hand_and_is_no_change_gives_no_order(changes: Any) -> None:
    assert orders_of({**message(), "changes": changes}, 1, 8) == []


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["lr=0.5"], "lr=0.5 is no change; give lr_scale=..., clip=..., skip_batches=..."),
        (["lr_scale"], "lr_scale is no change; give"),
        (["lr_scale=fast"], "lr_scale=fast must be a number above 0: it multiplies"),
        (["clip=-1"], "clip=-1 must be a number above 0"),
        (["skip_batches=1.5"], "skip_batches=1.5 must be a whole number above 0"),
        (["clip=1", "clip=2"], "clip is given twice; give it once"),
        (["loss_scale=100"], "loss_scale=100 must be a power of two above 0: it is the loss scale"),
    ],
)
def test_a_mistake_is_one_sentence(assignments: list[str], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        changes_of(assignments)
    assert sentence in str(caught.value)


def test_the_values_in_force_are_those_of_hand_arithmetic() -> None:
    config = RunConfig(
        optim=OptimConfig(lr=1.0, warmup_steps=0, schedule="constant"),
        train=TrainConfig(steps=100, global_batch=8),
    )
    ledger = (
        LedgerEntry(10, ScaleLr(1, "", 0.5)),
        LedgerEntry(12, SkipSamples(2, "", 24)),
        LedgerEntry(20, SetClip(3, "", 0.3)),
        LedgerEntry(30, ScaleLr(4, "", 4.0)),
    )

    def at(step: int) -> tuple[float, float, float]:
        values = in_force(config, ledger, step)
        return values["lr"], values["clip"], values["samples"]

    assert at(9) == (1.0, 1.0, 72)
    assert at(10) == (0.5, 1.0, 80)
    assert at(12) == (0.5, 1.0, 12 * 8 + 24)
    assert at(20) == (0.5, 0.3, 20 * 8 + 24)
    assert at(30) == (1.0, 0.3, 30 * 8 + 24), "given back, and no more than the schedule has"


def scales(precision: PrecisionConfig, *ledger: LedgerEntry) -> list[tuple[Any, Any, Any]]:
    """Scale, floor and factor of the embedding's gradient that are in force at steps 9 to 12."""
    names = ("loss_scale", "loss_scale_floor", "embedding_gradient")
    found = []
    for step in range(9, 13):
        values = in_force(RunConfig(precision=precision), ledger, step)
        found.append(tuple(values.get(name) for name in names))
    return found


def test_a_dynamic_scale_is_in_force_at_its_step_alone_and_its_floor_from_there_on() -> None:
    ledger = (
        LedgerEntry(10, SetLossScale(1, "", scale=256.0, floor=0.125)),
        LedgerEntry(10, ScaleEmbeddingGradient(2, "", 0.5)),
        LedgerEntry(11, SetLossScale(3, "", floor=0.5)),
        LedgerEntry(12, ScaleEmbeddingGradient(4, "", 0.5)),
    )
    fp16, fixed = (
        PrecisionConfig(compute="fp16", loss_scale=kind) for kind in ("metaseq", "fixed")
    )
    assert scales(fp16, *ledger) == [
        (None, 2.0**-5, 1.0),
        (256.0, 0.125, 0.5),
        (None, 0.5, 0.5),
        (None, 0.5, 0.25),
    ]
    # One that is fixed stays, and is its own floor; where nothing is scaled nothing changes.
    assert scales(fixed, *ledger[:1]) == [(1.0, 1.0, 1.0), *[(256.0, 256.0, 1.0)] * 3]
    assert scales(PrecisionConfig(compute="bf16"), *ledger[:1]) == [(1.0, None, 1.0)] * 4
