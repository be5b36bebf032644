"""A variable of NCCL's that somebody set, on one node or since the last restart, is on record."""

import json

from opt_train.protocol.facts import InForce
from opt_train.protocol.framing import MAX_FACT_BYTES, to_line
from opt_train.run.fabric_settings import (
    REST,
    fabric_settings,
    settings_apart,
    settings_difference,
)


def test_what_decides_how_ranks_talk_is_kept_and_nothing_else() -> None:
    environment = {
        "NCCL_IB_HCA": "mlx5",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "FI_PROVIDER": "efa",
        "UCX_TLS": "rc",
        "GLOO_SOCKET_IFNAME": "ib0",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "FILE": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    assert list(fabric_settings(environment)) == [
        "FI_PROVIDER",
        "GLOO_SOCKET_IFNAME",
        "NCCL_IB_HCA",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "UCX_TLS",
    ]


def test_they_fit_a_fact_whatever_is_set_and_a_change_is_still_seen() -> None:
    environment = {f"NCCL_{number}": "\u2028" * 150 for number in range(50)}
    environment |= {"NCCL_LONG": "x" * 9999}
    settings = fabric_settings(environment)
    values = {str(number): 0.123456789 for number in range(20)}
    assert len(to_line(InForce(values, settings))) < MAX_FACT_BYTES
    assert len(json.dumps(settings)) < MAX_FACT_BYTES - 1000
    changed = fabric_settings({**environment, "NCCL_LONG": "y" * 9999})
    [line] = settings_difference(settings, changed)
    assert line.startswith(f"{REST}: ")


def test_what_came_went_and_changed_is_told() -> None:
    before = {"NCCL_ALGO": "Ring", "NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5"}
    now = {"NCCL_ALGO": "Tree", "NCCL_IB_HCA": "mlx5", "UCX_TLS": "rc"}
    assert settings_difference(before, now) == (
        "NCCL_ALGO: Ring -> Tree",
        "NCCL_DEBUG: WARN -> not set",
        "UCX_TLS: not set -> rc",
    )
    assert settings_difference(now, now) == ()


def test_ranks_that_are_not_like_the_first_are_named_and_then_counted() -> None:
    ring, tree = {"NCCL_ALGO": "Ring"}, {"NCCL_ALGO": "Tree"}
    assert settings_apart({0: ring, 1: ring}) == ()
    assert settings_apart({0: ring, 1: tree}) == ("rank 1: NCCL_ALGO: Ring -> Tree",)
    many = settings_apart({0: ring} | dict.fromkeys(range(1, 9), tree))
    assert len(many) == 4
    assert many[-1] == "and 5 ranks more"
