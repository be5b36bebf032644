"""How long and in what portions a run trains."""

from dataclasses import dataclass
from typing import Annotated

from opt_train.protocol.keys import FIXED, NOT_NEGATIVE, OPERATIONAL, POSITIVE, TRAINING, Choices


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The step loop. Batches are counted in sequences."""

    steps: Annotated[int, POSITIVE, TRAINING] = 1000
    global_batch: Annotated[int, POSITIVE, FIXED] = 256
    """Sequences a step, over the world."""
    micro_batch: Annotated[int, POSITIVE, OPERATIONAL] = 8
    """Sequences a forward pass on one data-parallel rank."""
    validate_every: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 0
    """Steps; 0: at the end alone."""
    validate_sets_every: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 0
    """The same for `data.validation_sets`; 0: whenever `validate_every` is due. At the end all are
    measured."""
    layer_norms_every: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 100
    """Steps from one measurement of each layer's gradient and weight norms to the next; 0: never.
    This and the next two are taken on the first step after a start too (docs/metrics.md)."""
    attention_logit_every: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 100
    """Steps from one look for the largest attention logit to the next; 0: never."""
    speed_probe_every: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 50
    """Steps from one timing of each rank's own speed to the next; 0: never."""
    device: Annotated[str, Choices("auto", "cpu", "cuda"), OPERATIONAL] = "auto"
    """``cpu``, ``cuda``, or ``auto``: cuda where there is one."""
    initial_weights: Annotated[str, FIXED] = ""
    """A checkpoint's folder whose weights the run begins with, as `opt-train import` writes one;
    empty: they are drawn from the seed."""
    threads: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 0
    """Threads a rank on a CPU; 0: cores divided by ranks on the node."""
    collective_timeout_seconds: Annotated[float, POSITIVE, OPERATIONAL] = 600.0
    """After which a collective raises."""
    max_nonfinite_steps: Annotated[int, POSITIVE, TRAINING] = 10
    """Steps in a row that may be skipped for a non-finite gradient; at this many the rank leaves
    with code 81. In fp16 those count that were skipped at the loss scale's floor."""
    deterministic: Annotated[bool, OPERATIONAL] = False
    """Take deterministic kernels alone: slower, and the same bits on a GPU each time. An error
    where there is none."""
