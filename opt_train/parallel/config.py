"""How the work is spread over ranks, and in what precision it is done."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import (
    FIXED,
    NOT_NEGATIVE,
    OPERATIONAL,
    POSITIVE,
    POWER_OF_TWO,
    TRAINING,
    Choices,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; their product is the world size."""

    key_kind: ClassVar = OPERATIONAL

    engine: Annotated[str, Choices("fsdp2", "fairscale", "deepspeed")] = "fsdp2"
    """What spreads the model: ``fsdp2``, torch's own; ``fairscale``, FullyShardedDataParallel, with
    which OPT was trained; ``deepspeed``, ZeRO. The last two shard over all ranks alone, and are
    extras (opt-train[fairscale])."""
    zero_stage: Annotated[int, POSITIVE] = 3
    """Of engine=deepspeed (Rajbhandari et al. 2020, arXiv 1910.02054): 1 shards optimizer state, 2
    gradients too, 3 weights too."""
    replicate: Annotated[int, POSITIVE] = 1
    shard: Annotated[int, NOT_NEGATIVE] = 0
    """0: the world size divided by the other two."""
    tensor: Annotated[int, POSITIVE] = 1
    """Ranks that compute one layer together, with sequence parallelism; the ranks of one node."""
    activation_checkpointing: Annotated[str, Choices("none", "selective", "full")] = "none"
    """``none``; ``full``: keep each block's input alone and compute the rest again; ``selective``:
    attention alone."""
    accumulate: Annotated[str, Choices("shards", "whole")] = "shards"
    """Where the gradients of several micro-batches add up. ``shards``: summed over ranks after
    each, and a rank keeps its part; ``whole``: summed over ranks once, and until then each rank
    keeps all of them in the type of their sum."""
    compile: bool = False
    """Compile each block (torch.compile) at the first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """What the matrix products run in and the weights are kept in, and how fp16's gradients are
    kept from underflow."""

    compute: Annotated[str, Choices("fp32", "bf16", "fp16"), TRAINING] = "bf16"
    """``fp32``, ``bf16`` or ``fp16``. Only fp16 scales its loss (Micikevicius et al. 2018, arXiv
    1710.03740)."""
    weights: Annotated[str, Choices("fp32", "fp16"), FIXED] = "fp32"
    """``fp32``: master weights, 16 bytes a parameter with gradient and moments; ``fp16``: OPT's
    memory-efficient fp16, 12 bytes, with compute=fp16 alone."""
    loss_scale: Annotated[str, Choices("metaseq", "megatron", "fixed"), TRAINING] = "metaseq"
    """``metaseq``: OPT's own, its window grows with the scale; ``megatron``; ``fixed``. With
    compute=fp16 alone, like the keys below."""
    loss_scale_initial: Annotated[float, NOT_NEGATIVE, POWER_OF_TWO, TRAINING] = 0.0
    """Scale of the first step, a power of two; 0: the policy's (metaseq 4, megatron 2**32, fixed
    1)."""
    loss_scale_window_steps: Annotated[int, NOT_NEGATIVE, TRAINING] = 0
    """Steps without overflow before the scale doubles; 0: the policy's (metaseq 256 at first,
    megatron 1000)."""
    loss_scale_floor: Annotated[float, NOT_NEGATIVE, POWER_OF_TWO, TRAINING] = 0.0
    """The scale falls no further, a power of two; 0: the policy's (metaseq 2**-5, megatron 1)."""
    predivide: Annotated[bool, TRAINING] = True
    """Divide by the square root of the data-parallel ranks before gradients are summed over them,
    and by the other half afterwards (arXiv 2205.01068, section 2.2)."""
