"""How weights move."""

from dataclasses import dataclass
from typing import Annotated

from opt_train.protocol.keys import (
    BELOW_ONE,
    NOT_NEGATIVE,
    OPERATIONAL,
    POSITIVE,
    TRAINING,
    Choices,
    Law,
)

AT_MOST_ONE = Law(
    lambda value: value <= 1, "{key}={value} must be at most 1, a part of the peak", "<= 1"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and the schedule of OPT (arXiv 2205.01068, section 2.2)."""

    lr: Annotated[float, POSITIVE, TRAINING] = 6.0e-4
    """Peak learning rate."""
    beta1: Annotated[float, BELOW_ONE, TRAINING] = 0.9
    beta2: Annotated[float, BELOW_ONE, TRAINING] = 0.95
    eps: Annotated[float, POSITIVE, TRAINING] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE, TRAINING] = 0.1
    """On matrices; not on biases, LayerNorms."""
    clip: Annotated[float, POSITIVE, TRAINING] = 1.0
    """Largest global gradient norm."""
    skip_norm_z: Annotated[float, POSITIVE, TRAINING] = 12.0
    """A step is skipped whose gradient norm lies so many deviations above the accepted ones', if
    `optim.skip_norm_ratio` agrees."""
    skip_norm_ratio: Annotated[float, POSITIVE, TRAINING] = 8.0
    """And is so many times their median."""
    skip_loss_z: Annotated[float, POSITIVE, TRAINING] = 8.0
    """A step is skipped whose loss lies so many deviations above the accepted ones'."""
    skip_in_row: Annotated[int, NOT_NEGATIVE, TRAINING] = 4
    """Outliers skipped in a row at most; 0: none, ever."""
    warmup_steps: Annotated[int, NOT_NEGATIVE, TRAINING] = 2000
    schedule: Annotated[str, Choices("linear", "cosine", "wsd", "constant"), TRAINING] = "linear"
    """How the LR goes on from its peak. ``wsd``: warm-up, stable, decay."""
    decay_steps: Annotated[int, NOT_NEGATIVE, TRAINING] = 0
    """Steps until the LR reaches its floor, warm-up included; 0: `train.steps`."""
    cooldown_steps: Annotated[int, NOT_NEGATIVE, TRAINING] = 0
    """With ``wsd``, the steps before that within which it decays."""
    final_fraction: Annotated[float, POSITIVE, AT_MOST_ONE, TRAINING] = 0.1
    """The floor as a part of the peak."""
    fused: Annotated[str, Choices("auto", "torch", "apex"), OPERATIONAL] = "auto"
    """Whose kernels update fp32 weights and compute LayerNorms. ``apex``: NVIDIA's, on GPUs alone,
    LayerNorms where neither tensor groups nor a compiler have them; ``torch``; ``auto``: apex where
    it is installed."""
