"""When a loss scale moves: the two rules that trained the best-known fp16 models. Standard library
only."""

from dataclasses import dataclass, replace

from opt_train.parallel.config import PrecisionConfig

CEILING = 2.0**64
"""Where gradients are all zero nothing ever overflows: the scale must not grow to an infinity it
cannot leave again."""

SMALLEST = 2.0**-64
"""fp32 holds it and what it is multiplied with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScalePolicy:
    """The scale doubles after a window of steps without overflow and halves on overflow; it ends at
    a floor."""

    initial: float
    """Scale of the first step, a power of two."""
    floor: float
    """The scale falls no further. Who overflows here has lost its gradients."""
    window_steps: int = 0
    """Steps without overflow, counted from the last one, after which the scale doubles; 0: it never
    moves."""
    window_adapts: bool = False
    """The window doubles with the scale and halves on each overflow."""
    hysteresis: int = 1
    """Overflows since the scale last doubled before it halves; from then on each one halves it."""


METASEQ = LossScalePolicy(initial=4.0, floor=2.0**-5, window_steps=256, window_adapts=True)
"""OPT's: facebookresearch/metaseq, `metaseq/optim/dynamic_loss_scaler.py`."""

MEGATRON = LossScalePolicy(initial=2.0**32, floor=1.0, window_steps=1000, hysteresis=2)
"""NVIDIA/Megatron-LM, `DynamicGradScaler` in `megatron/core/optimizer/grad_scaler.py`, and its
default arguments."""

UNSCALED = LossScalePolicy(initial=1.0, floor=1.0)
"""For fp32 and bf16, whose exponents need no help."""

POLICIES = {"metaseq": METASEQ, "megatron": MEGATRON, "fixed": UNSCALED}


def policy_of(precision: PrecisionConfig) -> LossScalePolicy:
    """The policy that `precision` asks for, with what it changes about it."""
    if precision.compute != "fp16":
        return UNSCALED
    policy = POLICIES[precision.loss_scale]
    initial = precision.loss_scale_initial or policy.initial
    if precision.loss_scale == "fixed":
        return replace(policy, initial=initial, floor=initial)
    return replace(
        policy,
        initial=initial,
        floor=precision.loss_scale_floor or policy.floor,
        window_steps=precision.loss_scale_window_steps or policy.window_steps,
    )
