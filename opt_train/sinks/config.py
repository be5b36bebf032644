"""Where metrics are shown beside the chronicle."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import OPERATIONAL, POSITIVE, Choices


@dataclass(frozen=True, kw_only=True, slots=True)
class SinksConfig:
    """Services that get a copy of every metrics line, each from a process of its own
    (docs/metrics.md)."""

    key_kind: ClassVar = OPERATIONAL

    wandb: bool = False
    """Forward metrics to Weights & Biases, one W&B run for the life of the run directory. Needs the
    extra `wandb`."""
    wandb_project: str = "opt"
    wandb_mode: Annotated[str, Choices("offline", "online")] = "offline"
    """``offline``: into the run's folder `sinks/wandb`, for `wandb sync` later; ``online``: to the
    service too."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's folder `sinks/tensorboard`. Needs the extra
    `tensorboard`."""
    flush_seconds: Annotated[float, POSITIVE] = 10.0
    """What a sink gets to send its last lines when training has ended; then it is killed."""
