"""What training carries from step to step beside its tensors."""

import torch

from opt_train.train.state import seed_step


def drawn(seed: int, step: int, data_rank: int) -> tuple[float, ...]:
    seed_step(seed, step, data_rank)
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
