"""What is in force at a step: one pure function for rank and supervisor. Standard library and
configurations only."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from opt_train.optim.config import OptimConfig
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.optim.schedule import learning_rate
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.orders import LedgerEntry


class Portions(Protocol):
    """What this room needs of a `TrainConfig`, which it does not import: arrows point the other
    way."""

    @property
    def steps(self) -> int: ...
    @property
    def global_batch(self) -> int: ...


class Configuration(Protocol):
    """The part of a `RunConfig` that decides."""

    @property
    def optim(self) -> OptimConfig: ...
    @property
    def train(self) -> Portions: ...
    @property
    def precision(self) -> PrecisionConfig: ...


SCHEDULED = frozenset({"lr"})
"""An intervention may lower these below the schedule, and never raise them above it."""


def in_force(config: Configuration, ledger: Sequence[LedgerEntry], step: int) -> dict[str, float]:
    """The values that batch `step` (from 0) is trained with.

    `samples` is the number of sequences consumed or left out before the step: where the cursor
    stands. `embedding_gradient` is what the embedding's gradient is multiplied by.
    A dynamic loss scale is not in here: it is state, and `report_in_force` compares it with the
    checkpoint's. Of the step that an order sets it at it is, and so is its floor of every step.

    Args:
        ledger: lasting orders, oldest first (`run.ledger`); those that begin later change nothing.

    Raises:
        ValueError: an order in force is one that this version does not know.
    """
    optim = config.optim
    policy = policy_of(config.precision)
    fixed_scale = {} if policy.window_steps else {"loss_scale": policy.initial}
    floor = {"loss_scale_floor": policy.floor} if config.precision.compute == "fp16" else {}
    scheduled = {
        "lr": learning_rate(optim, step, config.train.steps),
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "clip": optim.clip,
        "samples": step * config.train.global_batch,
        "embedding_gradient": 1.0,
        **fixed_scale,
        **floor,
    }
    values: Mapping[str, float] = scheduled
    for entry in ledger:
        if entry.step <= step:
            values = entry.order.change(values, step - entry.step)
    capped = {name: min(values[name], scheduled[name]) for name in SCHEDULED}
    if fixed_scale and floor:
        # One that never moves has no place left to fall to.
        floor = {"loss_scale_floor": values["loss_scale"]}
        return {**values, **capped, **floor}
    return {**values, **capped}


def differences(expected: Mapping[str, float], reported: Mapping[str, Any]) -> list[str]:
    """`name: expected ..., in force ...` for each value of `expected` that was not reported as it
    should be."""
    return [
        f"{name}: expected {value!r}, in force {reported.get(name)!r}"
        for name, value in expected.items()
        if not _same(value, reported.get(name))
    ]


def _same(expected: float, reported: Any) -> bool:
    return isinstance(reported, (int, float)) and math.isclose(
        expected, reported, rel_tol=1e-12, abs_tol=0.0
    )
