"""One step's metrics line, from the step's word."""

import resource
import time
from typing import Any

import torch

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import flops_per_token
from opt_train.protocol.commands import Begin
from opt_train.train.state import TrainState
from opt_train.train.step_stats import StepStats

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense peak in bf16, and the same in fp16, by a part of the device's name (NVIDIA data sheets,
SXM); MFU is null for anything else."""
OTHER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL")
"""These names hold one of those above, but what they reach is less. (An A100 on PCIe has the same
peak.)"""


class Clock:
    """Seconds from step to step, without what is not training (saves, validation)."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap or reset."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds

    def reset(self) -> None:
        """Forget the time that has passed."""
        self._last = time.monotonic()


def memory_bytes(device: torch.device) -> int:
    """The most memory this rank has had: allocated on the device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def metrics_line(
    config: RunConfig,
    begin: Begin,
    state: TrainState,
    word: StepStats,
    learning_rate: float,
    device: torch.device,
) -> dict[str, Any]:
    """The line of the step that `word` speaks of; `state` has absorbed it and may be further on in
    `step`.

    The line's `step`, `samples`, `updates` and `tokens` count that step in, as a checkpoint taken
    behind it would.
    """
    rate = word.tokens / word.step_seconds if word.step_seconds > 0 else 0.0
    return {
        "attempt": begin.attempt,
        "step": word.step + 1,
        "updates": state.updates,
        "samples": (word.step + 1) * config.train.global_batch,
        "tokens": state.tokens,
        "time": round(time.time(), 3),
        "loss": word.loss,
        "lr": learning_rate,
        "grad_norm": word.grad_norm,
        "grad_norm_clipped": word.clipped_norm,
        "activation_norm": word.activation_norm,
        "loss_scale": word.loss_scale,
        "overflow": word.overflow,
        "skipped": word.skipped,
        "tokens_per_second": rate,
        "mfu": _mfu(config, rate / begin.world_size, device),
        "step_seconds": word.step_seconds,
        "data_seconds": word.data_seconds,
        "memory_bytes": word.memory_bytes,
        **word.probed.metrics(),
    }


def _mfu(config: RunConfig, tokens_per_second_of_one: float, device: torch.device) -> float | None:
    if device.type != "cuda" or config.precision.compute == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    if peak is None or any(board in name for board in OTHER_BOARDS):
        return None
    flops = flops_per_token(config.model, config.data.sequence_length)
    return tokens_per_second_of_one * flops / peak
