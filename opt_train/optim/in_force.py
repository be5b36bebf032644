"""What is in force at a step: one pure function for rank and supervisor. Standard library and
configurations only."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from opt_train.optim.config import OptimConfig
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.optim.schedule import learning_rate
from opt_train.parallel.config import PrecisionConfig


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


Ledger = Sequence[Mapping[str, Any]]
"""The interventions in force, oldest first. This version knows none: the ledger is empty."""


def in_force(config: Configuration, ledger: Ledger, step: int) -> dict[str, float]:
    """The values that batch `step` (from 0) is trained with.

    `samples` is the number of sequences consumed before the step, which is where the cursor stands.
    A dynamic loss scale is not in here: it is state, and `report_in_force` compares it with the
    checkpoint's.

    Raises:
        ValueError: the ledger holds an intervention that this version does not know.
    """
    if ledger:
        raise ValueError(
            f"the ledger holds an intervention that this version does not know: {dict(ledger[0])}"
        )
    optim = config.optim
    policy = policy_of(config.precision)
    fixed_scale = {} if policy.window_steps else {"loss_scale": policy.initial}
    return {
        "lr": learning_rate(optim, step, config.train.steps),
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "clip": optim.clip,
        **fixed_scale,
        "samples": step * config.train.global_batch,
    }


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
