"""Instruments beside the training: norms of each layer, the largest attention logit and each rank's
own speed on some steps, a sample of the logits on every one.

They touch neither losses nor gradients nor random numbers, and never wait for the device: what they
measure there comes to the host with the step's other numbers, and to the other ranks in the step
stats.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt_train.data.batches import MicroBatch
from opt_train.model.attention_logit import SAMPLE, WHOLE, Extent
from opt_train.model.decoder import OPT, Attention
from opt_train.parallel.engine import Engine, MeasuresLayers
from opt_train.train.config import TrainConfig


class Probes:
    """One step's instruments, in the order in which the step uses them. On most steps all but the
    sample of logits do nothing."""

    def __init__(
        self, config: TrainConfig, step: int, first: bool, engine: Engine, device: torch.device
    ) -> None:
        """Decide from what every rank knows alike.

        Args:
            step: counts the one that is about to be taken.
            first: no step was taken since the rank's start. All is measured then: whoever swapped a
                node or rolled back wants to know, and what compiles does so when it is expected.
        """
        self._layers = engine if _is_due(config.layer_norms_every, step, first) else None
        self._samples_logits = config.attention_logit_every > 0
        self._logits = _is_due(config.attention_logit_every, step, first)
        self._product = (
            FixedProduct(device) if _is_due(config.speed_probe_every, step, first) else None
        )
        self._model = engine.model
        self._device = device
        self._on_device: list[Tensor] = []

    def time_product(self) -> None:
        """Let the device do the fixed work, before the step's own."""
        if self._product is not None:
            self._product.start()

    @contextlib.contextmanager
    def watching_attention(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Around forward and backward: note the largest logit of the first micro-batch."""
        if not self._samples_logits:
            yield
            return
        weights = micro_batches[0].weights.to(self._device, non_blocking=True)
        with noting_logits(self._model, len(weights), self._device, self._logits) as largest:
            yield
        # Padding counts for nothing.
        highest = largest.masked_fill(weights == 0, -math.inf).amax(dim=1)
        self._on_device += [highest[SAMPLE], *([highest[WHOLE]] if self._logits else [])]

    def measure_layers(self, divisor: Tensor) -> None:
        """Between the gradient's norm, which `divisor` comes from, and the update."""
        if isinstance(self._layers, MeasuresLayers):
            self._on_device.append(self._layers.layer_squares(divisor))

    @property
    def on_device(self) -> list[Tensor]:
        """What is to come to the host."""
        return self._on_device

    def results(self, values: Sequence[float]) -> dict[str, Any]:
        """The columns of this rank's stats that were measured on this step, by name.

        Args:
            values: those of `on_device`, which the device has had by now.
        """
        rest = list(values)
        columns: dict[str, Any] = {}
        if self._samples_logits:
            columns["sampled_logit"] = rest.pop(0)
        if self._logits:
            columns["attention_logit"] = rest.pop(0)
        if rest:
            layers = len(rest) // 2
            columns["layer_grad_squares"] = tuple(rest[:layers])
            columns["layer_weight_squares"] = tuple(rest[layers:])
        if self._product is not None:
            columns["gemm_tflops"] = (self._product.tflops(),)
        return columns


def _is_due(every: int, step: int, first: bool) -> bool:
    return every > 0 and (first or step % every == 0)


@contextlib.contextmanager
def noting_logits(
    model: nn.Module, rows: int, device: torch.device, whole: bool = True
) -> Iterator[Tensor]:
    """The first forward pass inside, and its backward's recomputation, note largest logits in what
    this gives.

    Args:
        whole: look at all of them and not at the sample alone.

    Yields:
        fp32, [2, rows]: by sequence, the largest of all layers and of this rank's heads, of the
            sample (`SAMPLE`) and of all (`WHOLE`).
    """
    Extent.is_whole = whole
    largest = torch.full((2, rows), -math.inf, dtype=torch.float32, device=device)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    passes = 0

    def arm(*_: object) -> None:
        nonlocal passes
        passes += 1
        for attention in attentions:
            attention.largest_logits = largest if passes == 1 else None

    # Disarmed by the second pass and not by the end of the first, whose recomputation must do what
    # it did.
    (decoder,) = (module for module in model.modules() if isinstance(module, OPT))
    handle = decoder.register_forward_pre_hook(arm)
    try:
        yield largest
    finally:
        handle.remove()
        for attention in attentions:
            attention.largest_logits = None


class FixedProduct:
    """The same matrix product on every rank: its speed sets a slow device apart from its peers.

    On a GPU in bf16, by the device's own clock. On a CPU in fp32, by the process's clock, which
    counts the time of all its threads and none of its neighbours: the speed of one core, whoever
    else is on it. The matrices' numbers are drawn, because ones or zeros would take less power and
    run faster, and the trainer's random numbers are left alone.
    """

    REPEATS = 4

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._size = 256 if self._on_cpu else 4096
        self._seconds = 0.0
        self._events: tuple[torch.Event, torch.Event] | None = None

    def start(self) -> None:
        """Multiply: on a CPU now, on a GPU in its queue."""
        generator = torch.Generator(self._device).manual_seed(0)
        dtype = torch.float32 if self._on_cpu else torch.bfloat16
        shape = (self._size, self._size)
        one, other = (
            torch.randn(shape, generator=generator, device=self._device, dtype=dtype)
            for _ in range(2)
        )
        product = one @ other  # the first one finds its kernel and fills caches
        if self._on_cpu:
            began = time.process_time()
            self._multiply(one, other, product)
            self._seconds = time.process_time() - began
            return
        begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        begin.record()
        self._multiply(one, other, product)
        end.record()
        self._events = (begin, end)

    def _multiply(self, one: Tensor, other: Tensor, product: Tensor) -> None:
        for _ in range(self.REPEATS):
            torch.mm(one, other, out=product)

    def tflops(self) -> float:
        """10^12 floating point operations a second. On a GPU once the host has waited for something
        queued later."""
        if self._events is not None:
            begin, end = self._events
            self._seconds = begin.elapsed_time(end) / 1000
        operations = 2 * self._size**3 * self.REPEATS
        return operations / self._seconds / 1e12 if self._seconds > 0 else math.nan
