"""What a run computes and how long that takes, by the formulas of docs/metrics.md. Standard library
only."""

from dataclasses import dataclass

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import flops_per_token, parameter_count
from opt_train.plan.batch import Batch


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device that a plan is for."""

    name: str
    memory_gb: float
    """10^9 bytes, as it is sold."""
    peak_flops: float
    """Dense, in bf16 or fp16, a second (NVIDIA's data sheets, SXM)."""


# Half of what the data sheets print larger, which is with sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (Gpu("A100", 80, 312e12), Gpu("H100", 80, 989e12), Gpu("H200", 141, 989e12))
}

# 147 of 312 TFLOP/s are 47.1 %, recomputation included: hardware FLOPs utilisation. Without it, as
# every figure here is counted, 35.3 %. Others on A100s: MosaicML's llm-foundry 55 to 64 % from 1B
# to 30B on 8, Megatron 54.2 % at 530B on 2,240 (arXiv 2205.05198).
OPT_MFU = 0.353
"""Of OPT-175B on 992 A100s: 147 TFLOP/s a GPU (arXiv 2205.01068, section 2.4) without what
recomputation added."""

SECONDS_A_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """The arithmetic of a run and, at an assumed MFU, its time."""

    model_flops_per_token: int
    """Forward and backward; the numerator of MFU."""
    hardware_flops_per_token: int
    """The same with what activation checkpointing computes again."""
    tokens_per_step: int
    steps: int
    mfu: float
    """Assumed, of the sequences that are computed, padding included."""
    step_seconds: float | None
    """None in fp32, for which no peak is known."""
    days: float | None
    """Of all steps, with nothing else: no saves, no validation, no failures."""

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def throughput_of(
    config: RunConfig, batch: Batch, gpu: Gpu, mfu: float, tokens: int | None
) -> Throughput:
    """What `config` computes on `gpu` at `mfu`.

    Args:
        tokens: to train on; None: what `train.steps` makes.
    """
    length = config.data.sequence_length
    # 6 N + 12 L d s: nothing for recomputation, so that MFU compares between modes.
    model_flops = flops_per_token(config.model, length)
    tokens_per_step = batch.sequences * length
    steps = config.train.steps if tokens is None else -(-tokens // tokens_per_step)
    step_seconds = None
    if config.precision.compute != "fp32":
        step_seconds = (
            batch.computed * length * model_flops / (config.world_size * gpu.peak_flops * mfu)
        )
    return Throughput(
        model_flops_per_token=model_flops,
        hardware_flops_per_token=model_flops + recomputed_flops_per_token(config),
        tokens_per_step=tokens_per_step,
        steps=steps,
        mfu=mfu,
        step_seconds=step_seconds,
        days=None if step_seconds is None else steps * step_seconds / SECONDS_A_DAY,
    )


def recomputed_flops_per_token(config: RunConfig) -> int:
    """What activation checkpointing adds to a token's forward and backward pass."""
    model, length = config.model, config.data.sequence_length
    # Two products, scores and values, of 2 d s operations each; as in 12 L d s, what the causal
    # mask would save is not taken off.
    attention = 4 * model.d_model * length
    match config.parallel.activation_checkpointing:
        case "full":
            # A forward pass takes 2 operations a parameter; the tied head lies outside the blocks
            # and is not computed again.
            blocks = parameter_count(model) - model.vocab_size * model.embedding_width
            return 2 * blocks + model.layers * attention
        case "selective":
            # The four projections again, and the products of scores and values.
            return model.layers * (8 * model.d_model**2 + attention)
        case _:
            return 0
