"""The learning rate by step: linear warm-up, then linear decay to a floor. Standard library
only."""

from opt_train.optim.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The LR of the batch numbered `step` (from 0), in a run of `steps` (arXiv 2205.01068, section
    2.2).

    The first batch gets 1/warmup of the peak ``optim.lr``, batch ``optim.warmup_steps`` - 1 the
    peak; from there it falls linearly and reaches ``optim.final_fraction`` of the peak at batch
    ``optim.decay_steps``, where it stays.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    end = optim.decay_steps or steps
    floor = optim.lr * optim.final_fraction
    # Warm-up hands over at the batch that had the peak, so that no batch has it twice.
    begin = max(optim.warmup_steps - 1, 0)
    # Before the division below: a run may end inside its warm-up.
    if step >= end:
        return floor
    done = (step - begin) / (end - begin)
    return optim.lr + (floor - optim.lr) * done
