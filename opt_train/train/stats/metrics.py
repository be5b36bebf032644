"""One step's metrics line: the columns of its stats, and what rank 0 knows beside them."""

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import flops_per_token
from opt_train.protocol.commands import Begin
from opt_train.train.state import TrainState
from opt_train.train.stats.columns import Metric
from opt_train.train.stats.step_stats import COLUMNS, StepStats, step_metrics

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
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsSource:
    """What the metrics of a step are made of, beside those that are columns of its stats."""

    config: RunConfig
    begin: Begin
    state: TrainState
    """Has absorbed `stats`; may be further on in `step`."""
    stats: StepStats
    learning_rate: float
    """Of the step's update."""
    samples: int
    """Where the cursor stands behind the step."""
    device: torch.device
    loss_scale_floor: float | None = None
    """In force for the step; None: nothing is scaled."""


def _mfu(source: MetricsSource) -> float | None:
    """Model FLOPs utilisation; None where the device's peak is unknown."""
    config, device = source.config, source.device
    if device.type != "cuda" or config.precision.compute == "fp32":
        return None
    # A wrong peak would be believed: better none than a guess.
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    if peak is None or any(board in name for board in OTHER_BOARDS):
        return None
    flops = flops_per_token(config.model, config.data.sequence_length)
    return source.stats.tokens_per_second / source.begin.world_size * flops / peak


OTHER_METRICS = (
    Metric(
        "attempt",
        "`lineage.attempt`, a string",
        "a stretch in which `step` only grows; a restart opens the next",
        lambda source: source.begin.attempt,
    ),
    # `step`, `updates`, `samples` and `tokens` count the step in, as a checkpoint behind it would.
    Metric(
        "step",
        "batches",
        "consumed so far, this one included",
        lambda source: source.stats.step + 1,
    ),
    Metric(
        "updates",
        "updates",
        "applied so far: steps that were not skipped",
        lambda source: source.state.updates,
    ),
    Metric(
        "samples",
        "sequences",
        "consumed or left out so far: where the cursor stands",
        lambda source: source.samples,
    ),
    Metric("tokens", "tokens", "trained on so far", lambda source: source.state.tokens),
    Metric(
        "time",
        "Unix seconds",
        "when rank 0 made the line, one step after the step itself",
        lambda _: round(time.time(), 3),
    ),
    Metric("lr", "", "learning rate of this step's update", lambda source: source.learning_rate),
    Metric(
        "loss_scale_floor",
        "",
        "`loss_scale` falls no further; `null` where gradients are not scaled",
        lambda source: source.loss_scale_floor,
    ),
    Metric(
        "mfu",
        "0 to 1",
        "model FLOPs utilisation, below; `null` where the device's peak is unknown, as on a CPU",
        _mfu,
    ),
)
"""The metrics that are no column of the step stats: what rank 0 knows without the world."""

JOURNAL_HEAD = Metric(
    "journal_head",
    "`seq hash`, a string",
    "in an attempt's first line alone: where the journal stood",
    lambda source: source.begin.journal_head,
)

METRICS = (
    *OTHER_METRICS,
    *(metric for column in COLUMNS for metric in column.metrics),
    JOURNAL_HEAD,
)
"""All keys of a metrics line, as docs/metrics.md has them."""


def metrics_line(source: MetricsSource, is_first: bool = False) -> dict[str, Any]:
    """The metrics line of the step that `source.stats` are of.

    Args:
        is_first: of the attempt: it says where the journal stood.
    """
    line = {metric.key: metric.value(source) for metric in OTHER_METRICS}
    line |= step_metrics(source.stats)
    if is_first and source.begin.journal_head:
        line[JOURNAL_HEAD.key] = JOURNAL_HEAD.value(source)
    return line
