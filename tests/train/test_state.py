"""What training carries from step to step beside its tensors."""

import os

import pytest
import torch

from opt_train.train.state import seed_step

CPU = torch.device("cpu")


def drawn(seed: int, step: int, data_rank: int) -> tuple[float, ...]:
    seed_step(seed, step, data_rank, CPU)
    return tuple(torch.rand(4).tolist())


def test_every_step_of_every_data_rank_has_dropout_of_its_own_and_a_restart_has_the_same() -> None:
    """Ranks that share their masks train on fewer of them than they seem to; ones that differ after
    a restart, anew."""
    masks = {
        (seed, step, rank): drawn(seed, step, rank)
        for seed in (0, 1)
        for step in (0, 1, 7)
        for rank in (0, 1, 9)
    }
    assert len(set(masks.values())) == len(masks)
    assert all(drawn(*key) == mask for key, mask in masks.items())


def test_seeding_a_step_asks_the_file_system_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` formats the stack for devices that are not here, which looks at every
    source file in it; a rank whose code is on a file system that stands still then stands too."""

    def refuse(path: object, *_: object, **__: object) -> os.stat_result:
        raise AssertionError(f"{path} was looked at")

    monkeypatch.setattr(os, "stat", refuse)
    seed_step(0, 1, 2, CPU)
    with pytest.raises(AssertionError, match=r"was looked at"):
        torch.manual_seed(0)
