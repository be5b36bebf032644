"""The learning rate by step: a linear warm-up, then one of four ways on. Standard library only."""

import math

from opt_train.optim.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The LR of the batch numbered `step` (from 0), in a run of `steps`.

    The first batch gets 1/warmup of the peak ``optim.lr``, batch ``optim.warmup_steps`` - 1 the
    peak. From there ``optim.schedule`` says how it comes to ``optim.final_fraction`` of the peak,
    which batch ``optim.decay_steps`` has and all that follow: on a line (OPT: arXiv 2205.01068,
    section 2.2), on half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983), on a line within
    the last ``optim.cooldown_steps`` (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395), or
    not at all.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    end = optim.decay_steps or steps
    # Warm-up hands over at the batch that had the peak, so that no batch has it twice.
    begin = max(optim.warmup_steps - 1, 0)
    if optim.schedule == "wsd":
        begin = max(begin, end - optim.cooldown_steps)
    floor = optim.lr * optim.final_fraction
    # Before the division below: a run may end inside its warm-up.
    if step >= end:
        return floor
    done = max(0.0, (step - begin) / (end - begin))
    if optim.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return optim.lr + (floor - optim.lr) * done
