"""How weights move."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and the schedule of OPT (arXiv 2205.01068, section 2.2)."""

    lr: float = 6.0e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; not on biases, LayerNorms."""
    clip: float = 1.0
    """Largest global gradient norm."""
    warmup_steps: int = 2000
    decay_steps: int = 0
    """Steps until the LR reaches its floor, warm-up included; 0: `train.steps`."""
    final_fraction: float = 0.1
    """The floor as a part of the peak."""
    fused: str = "auto"
    """Whose kernels update fp32 weights and compute LayerNorms. ``apex``: NVIDIA's, on GPUs alone,
    LayerNorms where neither tensor groups nor a compiler have them; ``torch``; ``auto``: apex where
    it is installed."""
