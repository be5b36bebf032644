"""How long and in what portions a run trains."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The step loop. Batches are counted in sequences."""

    steps: int = 1000
    global_batch: int = 256
    """Sequences a step, over the world."""
    micro_batch: int = 8
    """Sequences a forward pass on one data-parallel rank."""
    validate_every: int = 0
    """Steps; 0: at the end alone."""
    validate_sets_every: int = 0
    """The same for `data.validation_sets`; 0: whenever `validate_every` is due. At the end all are
    measured."""
    layer_norms_every: int = 100
    """Steps from one measurement of each layer's gradient and weight norms to the next; 0: never.
    This and the next two are taken on the first step after a start too (docs/metrics.md)."""
    attention_logit_every: int = 100
    """Steps from one look for the largest attention logit to the next; 0: never."""
    speed_probe_every: int = 50
    """Steps from one timing of each rank's own speed to the next; 0: never."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: cuda where there is one."""
    initial_weights: str = ""
    """A checkpoint's folder whose weights the run begins with, as `opt-train import` writes one;
    empty: they are drawn from the seed."""
    threads: int = 0
    """Threads a rank on a CPU; 0: cores divided by ranks on the node."""
    collective_timeout_seconds: float = 600.0
    """After which a collective raises."""
    max_nonfinite_steps: int = 10
    """Steps in a row that may be skipped for a non-finite gradient; at this many the rank leaves
    with code 81. In fp16 those count that were skipped at the loss scale's floor."""
    deterministic: bool = False
    """Take deterministic kernels alone: slower, and the same bits on a GPU each time. An error
    where there is none."""
