"""How the work is spread over ranks, and in what precision it is done."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; their product is the world size."""

    engine: str = "fsdp2"
    """What spreads the model: ``fsdp2``, torch's own; ``fairscale``, FullyShardedDataParallel, with
    which OPT was trained; ``deepspeed``, ZeRO. The last two shard over all ranks alone, and are
    extras (opt-train[fairscale])."""
    zero_stage: int = 3
    """Of engine=deepspeed (Rajbhandari et al. 2020, arXiv 1910.02054): 1 shards optimizer state, 2
    gradients too, 3 weights too."""
    replicate: int = 1
    shard: int = 0
    """0: the world size divided by the other two."""
    tensor: int = 1
    """Ranks that compute one layer together, with sequence parallelism; the ranks of one node."""
    activation_checkpointing: str = "none"
    """``none``; ``full``: keep each block's input alone and compute the rest again; ``selective``:
    attention alone."""
    accumulate: str = "shards"
    """Where the gradients of several micro-batches add up. ``shards``: summed over ranks after
    each, and a rank keeps its part; ``whole``: summed over ranks once, and until then each rank
    keeps all of them in the type of their sum."""
    compile: bool = False
    """Compile each block (torch.compile) at the first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """What the matrix products run in and the weights are kept in, and how fp16's gradients are
    kept from underflow."""

    compute: str = "bf16"
    """``fp32``, ``bf16`` or ``fp16``. Only fp16 scales its loss (Micikevicius et al. 2018, arXiv
    1710.03740)."""
    weights: str = "fp32"
    """``fp32``: master weights, 16 bytes a parameter with gradient and moments; ``fp16``: OPT's
    memory-efficient fp16, 12 bytes, with compute=fp16 alone."""
    loss_scale: str = "metaseq"
    """``metaseq``: OPT's own, its window grows with the scale; ``megatron``; ``fixed``. With
    compute=fp16 alone, like the keys below."""
    loss_scale_initial: float = 0.0
    """Scale of the first step, a power of two; 0: the policy's (metaseq 4, megatron 2**32, fixed
    1)."""
    loss_scale_window_steps: int = 0
    """Steps without overflow before the scale doubles; 0: the policy's (metaseq 256 at first,
    megatron 1000)."""
    loss_scale_floor: float = 0.0
    """The scale falls no further, a power of two; 0: the policy's (metaseq 2**-5, megatron 1)."""
    predivide: bool = True
    """Divide by the square root of the data-parallel ranks before gradients are summed over them,
    and by the other half afterwards (arXiv 2205.01068, section 2.2)."""
