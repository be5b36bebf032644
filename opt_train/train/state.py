"""Where training stands: what a checkpoint carries beside its tensors (`state.json`)."""

import hashlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import isfinite
from typing import Any

import torch

from opt_train.config.run_config import RunConfig
from opt_train.data.order import Cursor
from opt_train.optim.in_force import in_force
from opt_train.protocol.framing import to_payload
from opt_train.run import ledger as ledgers
from opt_train.run.ledger import Ledger
from opt_train.train.stats.step_stats import StepStats

HISTORY_STEPS = 128
"""Losses and gradient norms that go with a checkpoint, so that a detector need not learn anew after
a restart."""

RNG_RULE = "sha256(seed, step, rank) seeds every step"


@dataclass(slots=True)
class TrainState:
    """Counters and recent history. `step` counts batches consumed; the rest lags it by the stats
    not received yet."""

    step: int = 0
    updates: int = 0
    """Optimizer updates applied: steps without those that were skipped."""
    tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    ledger: Ledger = ()
    """Lasting orders; those of the run, which may know more than the checkpoint did."""
    floor_steps: int = 0
    """Steps skipped in a row, up to the newest stats, although the loss scale was as low as it
    goes; without a scale, all that were skipped."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))
    accepted_losses: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))
    """Of steps that were applied, as the device knew them: what an outlier is measured by."""
    accepted_norms: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))
    refused_in_row: int = 0
    """Steps skipped as outliers, one after the other, up to the newest stats."""

    @property
    def samples(self) -> int:
        """Sequences consumed, over the world."""
        return self.cursor.samples

    @property
    def healthy(self) -> bool:
        """Whether the newest stats were of training that goes well."""
        return self.floor_steps == 0 and (not self.losses or isfinite(self.losses[-1]))

    def is_due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps (0: never) happens now."""
        return every > 0 and self.step % every == 0

    def absorb(self, stats: StepStats, loss_scale_floor: float = 1.0) -> None:
        """Count a step. Above its floor an overflow is but how a loss scale finds its place."""
        # Nothing the scale can do helps any more: these count towards `train.max_nonfinite_steps`.
        hopeless = stats.skipped and stats.loss_scale <= loss_scale_floor
        if not stats.refused:
            self.floor_steps = self.floor_steps + hopeless if stats.skipped else 0
        self.tokens += int(stats.tokens)
        self.updates += not stats.skipped
        self.losses.append(stats.loss)
        self.grad_norms.append(stats.grad_norm)
        if stats.refused:
            self.refused_in_row += 1
        elif not stats.skipped:
            self.refused_in_row = 0
            self.accepted_losses.append(stats.mean_loss)
            self.accepted_norms.append(stats.grad_norm)

    def _nonfinite_steps(self) -> int:
        """Steps in a row, up to the newest stats, whose gradient was not finite: all skipped."""
        return sum(1 for _ in takewhile(lambda norm: not isfinite(norm), reversed(self.grad_norms)))

    def to_json(self) -> dict[str, Any]:
        """The part of `state.json` that `from_json` reads; JSON values alone."""
        loss = self.losses[-1] if self.losses else None
        norm = self.grad_norms[-1] if self.grad_norms else None
        payload: dict[str, Any] = to_payload(
            {
                "counters": {
                    "step": self.step,
                    "updates": self.updates,
                    "samples": self.samples,
                    "tokens": self.tokens,
                },
                "cursor": {"samples": self.cursor.samples},
                "ledger": ledgers.to_json(self.ledger),
                "guards": {
                    "losses": list(self.losses),
                    "grad_norms": list(self.grad_norms),
                    # A published field that this version does not read, but older ones do.
                    "nonfinite_steps": self._nonfinite_steps(),
                    "floor_steps": self.floor_steps,
                    "accepted_losses": list(self.accepted_losses),
                    "accepted_norms": list(self.accepted_norms),
                    "refused_in_row": self.refused_in_row,
                },
                "healthy": self.healthy,
                "health": {"loss": loss, "grad_norm": norm, "finite": self.floor_steps == 0},
            }
        )
        return payload

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TrainState":
        """The state that a checkpoint carried.

        Raises:
            KeyError, TypeError, ValueError: it is not what `to_json` makes.
        """
        counters, guards = state["counters"], state["guards"]
        return cls(
            step=int(counters["step"]),
            updates=int(counters["updates"]),
            tokens=int(counters["tokens"]),
            cursor=Cursor(int(state["cursor"]["samples"])),
            ledger=ledgers.from_json(state.get("ledger", ())),
            floor_steps=int(guards.get("floor_steps", guards["nonfinite_steps"])),
            losses=deque(map(float, guards["losses"]), maxlen=HISTORY_STEPS),
            grad_norms=deque(map(float, guards["grad_norms"]), maxlen=HISTORY_STEPS),
            accepted_losses=deque(map(float, guards.get("accepted_losses", ())), HISTORY_STEPS),
            accepted_norms=deque(map(float, guards.get("accepted_norms", ())), HISTORY_STEPS),
            refused_in_row=int(guards.get("refused_in_row", 0)),
        )


def values_of(config: RunConfig, state: TrainState) -> dict[str, float]:
    """What the batch at `state.step` is trained with: LR, betas, eps, decay, clip."""
    return in_force(config, state.ledger, state.step)


def cursor_of(config: RunConfig, state: TrainState) -> Cursor:
    """Where the batch at `state.step` begins in the order of the data."""
    return Cursor(int(values_of(config, state)["samples"]))


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed this process for batch `step`, on the CPU and on `device`: dropout then depends on
    nothing that a restart could lose.

    By rank, not by share of the data: the ranks of a tensor group hold different parts of a
    sequence.
    """
    # A hash and no sum: seeds of neighbouring steps and ranks must not be near, nor ever coincide.
    digest = hashlib.sha256(f"opt_train step {seed} {step} {rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    # Not torch.manual_seed: for each kind of device that is not here it formats the stack, which
    # looks at our source files, and those may lie on a file system that stands still.
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
