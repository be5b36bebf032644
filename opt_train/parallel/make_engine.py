"""The engine that a configuration asks for."""

from collections.abc import Mapping

import torch

from opt_train.model.config import ModelConfig
from opt_train.model.init import Progress
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import Engine
from opt_train.parallel.fsdp import Fsdp2, build
from opt_train.parallel.layout import Layout


def make_engine(
    model: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    layout: Layout,
    device: torch.device,
    *,
    values: Mapping[str, float],
    seed: int | None,
    progress: Progress | None = None,
    fused: str = "torch",
) -> Engine:
    """The engine that `parallel.engine` names, with initial weights. Needs a process group.

    The optional ones are imported here alone: they cost seconds, and change torch as they load.

    Args:
        values: what is in force (`opt_train.optim.in_force`).
        seed: of the initial weights; None: they hold anything, for somebody who fills every one
            from a checkpoint.
        progress: told how many parameters of how many have their initial weights.
        fused: `OptimConfig.fused`; the optional engines have torch's.

    Raises:
        BadInput: what is asked for is not there.
    """
    if parallel.engine == "fairscale":
        from opt_train.parallel.fairscale_engine import Fairscale

        return Fairscale(model, precision, parallel, device, values, seed, progress)
    if parallel.engine == "deepspeed":
        from opt_train.parallel.deepspeed_engine import DeepSpeed

        return DeepSpeed(model, precision, parallel, device, values, seed, progress)
    built = build(model, precision, parallel, layout, device, seed, progress, fused)
    return Fsdp2(built, device, values, parallel.accumulate, fused)
