"""What the optimizer says is in force is read from all of it: one group or parameter apart must not
go unseen."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from opt_train.optim.adamw import make_optimizer, really_in_force

VALUES = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def made() -> torch.optim.AdamW:
    return make_optimizer(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), VALUES)


def test_what_was_put_in_force_is_reported() -> None:
    assert really_in_force(made()) == {**VALUES, "updates": 0}


def other_rate(optimizer: torch.optim.AdamW) -> None:
    optimizer.param_groups[1]["lr"] = 2e-3


def other_betas(optimizer: torch.optim.AdamW) -> None:
    optimizer.param_groups[1]["betas"] = (0.9, 0.999)


def other_eps(optimizer: torch.optim.AdamW) -> None:
    optimizer.param_groups[1]["eps"] = 1e-6


def decayed_vectors(optimizer: torch.optim.AdamW) -> None:
    optimizer.param_groups[1]["weight_decay"] = 0.1


def one_parameter_that_was_not_restored(optimizer: torch.optim.AdamW) -> None:
    for state in list(optimizer.state.values())[1:]:
        state["step"].fill_(7)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (other_rate, "lr"),
        (other_betas, "beta2"),
        (other_eps, "eps"),
        (decayed_vectors, "weight_decay"),
        (one_parameter_that_was_not_restored, "updates"),
    ],
)
def test_one_part_that_differs_equals_nothing(
    plant: Callable[[torch.optim.AdamW], None], name: str
) -> None:
    optimizer = made()
    plant(optimizer)
    reported = really_in_force(optimizer)
    assert [key for key, value in reported.items() if math.isnan(value)] == [name]
