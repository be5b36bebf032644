"""What the parts of one rank's training share: given once, when the rank starts."""

import dataclasses
import time
from dataclasses import dataclass, field

import torch

from opt_train.config.run_config import RunConfig
from opt_train.optim.clip import predivision
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.outlier_guard import OutlierGuard
from opt_train.parallel.engine import Engine
from opt_train.parallel.layout import Layout
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Phase, Progress
from opt_train.train.fact_pipe import Publish
from opt_train.train.state import RNG_RULE, TrainState
from opt_train.train.stats.metrics import Clock

PROGRESS_SECONDS = 0.5
"""Between two `Progress` facts of the same work: an agent's timeout is far longer, and a fact for
each file or micro-batch would fill the pipe."""


@dataclass(slots=True, kw_only=True)
class RankContext:
    """One rank's configuration, engine and state, and its way to its agent."""

    begin: Begin
    config: RunConfig
    layout: Layout
    device: torch.device
    engine: Engine
    loss_scale: LossScale
    guard: OutlierGuard
    data_fingerprint: str
    state: TrainState
    publish: Publish
    clock: Clock = field(default_factory=Clock)
    """Reset by whatever is not training, so that `step_seconds` counts training alone."""
    _progress_at: float = 0.0

    @property
    def is_rank_zero(self) -> bool:
        return self.begin.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of each batch this rank reads."""
        return self.layout.data_rank(self.begin.rank)

    @property
    def predivision(self) -> float:
        """What gradients are multiplied by beside the loss scale, against overflow in their sum
        over ranks."""
        precision = self.config.precision
        enabled = precision.predivide and precision.compute == "fp16"
        return predivision(enabled, self.layout.data_world)

    def enter(self, phase: str) -> None:
        """Publish what the rank is busy with from now on; the agent's clock times it."""
        self.publish(Phase(phase, self.state.step))

    def progress(self, done: int, total: int) -> None:
        """Publish that long work goes on, every `PROGRESS_SECONDS` at most."""
        # By this rank's clock alone: progress is for the agent, and no rank decides by it.
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = now
            self.publish(Progress(min(done, total), total))

    def state_json(self) -> dict[str, object]:
        """What a checkpoint of this moment carries beside its tensors (`state.json`)."""
        return {
            **self.state.to_json(),
            # Nothing here is a tensor or a pickle: a checkpoint is read without executing anything.
            "data_fingerprint": self.data_fingerprint,
            "loss_scale": self.loss_scale.to_json(),
            "rng": {"rule": RNG_RULE, "seed": self.config.seed},
            "layout": dataclasses.asdict(self.layout),
            "attempt": self.begin.attempt,
            "generation": self.begin.generation,
            "configuration_sha256": self.begin.config_sha256,
            "journal_head": self.begin.journal_head,
        }
