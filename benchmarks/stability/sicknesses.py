"""What goes wrong, put into the real training loop of a rank.

`inject` wraps what the loop calls: reading a batch, putting values in force, taking a step, the
gradient's norm. Nothing of the guard, the metrics, the snapshots or the rollback is touched, and
validation reads its own data.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt_train.data.batches import Batches, MicroBatch
from opt_train.data.order import Cursor
from opt_train.optim.clip import GradNorm, local_part
from opt_train.parallel.fsdp import Fsdp2
from opt_train.train import loop, step
from opt_train.train.training import Training

FIRST_TOKEN = 4
"""Below are the special entries."""
FOR_GOOD = 1 << 62


class Struck:
    """An event happens once, whatever is trained again and whichever process does it."""

    def __init__(self, spec: Mapping[str, Any], folder: Path) -> None:
        self._first = int(spec["first"])
        self._steps = int(spec.get("steps") or FOR_GOOD)
        self._mark = folder / "struck"
        self._lasts_for_good = not spec.get("steps")
        self.run: Training | None = None
        self.taken = -1
        """Steps taken since it struck; -1: it has not."""

    def strikes(self, run: Training) -> bool:
        """Whether the step to be taken is the one that it strikes at, for the first time."""
        self.run = run
        if self.taken >= 0:
            self.taken += 1
            return False
        if run.state.step < self._first:
            return False
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            # Of a process before this one. What lasts for good lasts; what was short is over.
            self.taken = 0 if self._lasts_for_good else FOR_GOOD
            return False
        self.taken = 0
        return True

    @property
    def lasts(self) -> bool:
        """Whether the step under way is one of those that it lasts for."""
        if self._lasts_for_good:
            # Of the configuration's kind: it holds from its step on, wherever training stands.
            return self.run is not None and self.run.state.step >= self._first
        return 0 <= self.taken < self._steps


def inject(spec: Mapping[str, Any]) -> None:
    """Make this process train as the sickness `spec` has it; empty: as ever."""
    if spec:
        INJECTIONS[spec["what"]](spec)


# Batches ------------------------------------------------------------------------------------------

Poison = Callable[[MicroBatch, torch.Generator, int], tuple[Tensor, Tensor]]
"""Batch, randomness and the vocabulary's size -> tokens and targets."""


def _whole(batch: MicroBatch) -> Tensor:
    """[micro, sequence + 1]: tokens and the last target."""
    return torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)


def _cut(whole: Tensor) -> tuple[Tensor, Tensor]:
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()


def _garbage(batch: MicroBatch, random: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    shape = _whole(batch).shape
    return _cut(torch.randint(FIRST_TOKEN, vocabulary, shape, generator=random))


def _half_garbage(
    batch: MicroBatch, random: torch.Generator, vocabulary: int
) -> tuple[Tensor, Tensor]:
    whole = _whole(batch)
    rows = len(whole) // 2
    shape = (rows, whole.shape[1])
    whole[:rows] = torch.randint(FIRST_TOKEN, vocabulary, shape, generator=random)
    return _cut(whole)


def _one_token(batch: MicroBatch, _: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    return _cut(torch.full_like(_whole(batch), vocabulary // 2))


def _tokens_shuffled(batch: MicroBatch, random: torch.Generator, _: int) -> tuple[Tensor, Tensor]:
    whole = _whole(batch)
    order = torch.rand(whole.shape, generator=random).argsort(dim=1)
    return _cut(whole.gather(1, order))


def _other_ids(batch: MicroBatch, _: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    # One other order for all batches, as another tokenizer would have.
    order = torch.randperm(vocabulary - FIRST_TOKEN, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.arange(FIRST_TOKEN), order + FIRST_TOKEN])
    return _cut(ids[_whole(batch)])


def _labels_shuffled(batch: MicroBatch, random: torch.Generator, _: int) -> tuple[Tensor, Tensor]:
    flat = batch.targets.flatten()
    shuffled = flat[torch.randperm(len(flat), generator=random)]
    return batch.tokens, shuffled.reshape(batch.targets.shape)


def _labels_are_inputs(batch: MicroBatch, *_: object) -> tuple[Tensor, Tensor]:
    return batch.tokens, batch.tokens.clone()


def _labels_two_ahead(batch: MicroBatch, *_: object) -> tuple[Tensor, Tensor]:
    return batch.tokens, batch.targets.roll(-1, dims=1)


def _labels_rolled(batch: MicroBatch, *_: object) -> tuple[Tensor, Tensor]:
    return batch.tokens, batch.targets.roll(1, dims=0)


POISONS: Mapping[str, Poison] = {
    "garbage": _garbage,
    "half_garbage": _half_garbage,
    "one_token": _one_token,
    "tokens_shuffled": _tokens_shuffled,
    "other_ids": _other_ids,
    "labels_shuffled": _labels_shuffled,
    "labels_are_inputs": _labels_are_inputs,
    "labels_two_ahead": _labels_two_ahead,
    "labels_rolled": _labels_rolled,
}
ONE_DOCUMENT = "one_document"

batches_at = Batches.at


def poison_batches(how: str, wanted: Callable[[int], bool], vocabulary: int = 320) -> None:
    """Change every batch whose number is `wanted`, wherever it is read."""

    def at(batches: Batches, cursor: Cursor, **share: Any) -> list[MicroBatch]:
        number = cursor.samples // batches.global_batch
        micro_batches = batches_at(batches, cursor, **share)
        if not wanted(number):
            return micro_batches
        if how == ONE_DOCUMENT:
            [first, *_] = batches_at(batches, Cursor(0), **share)
            whole = _whole(first)[:1].expand(len(first.tokens), -1).clone()
            return [MicroBatch(*_cut(whole), batch.weights) for batch in micro_batches]
        random = torch.Generator().manual_seed(cursor.samples)
        return [
            MicroBatch(*POISONS[how](batch, random, vocabulary), batch.weights)
            for batch in micro_batches
        ]

    Batches.at = at  # type: ignore[method-assign,assignment]


def _batches(spec: Mapping[str, Any]) -> None:
    first, length = spec["first"], spec["length"]
    poison_batches(spec["how"], lambda number: first <= number < first + length)


def _circle(spec: Mapping[str, Any]) -> None:
    first, period = spec["first"], spec["batches"]

    def at(batches: Batches, cursor: Cursor, **share: Any) -> list[MicroBatch]:
        number = cursor.samples // batches.global_batch
        if number >= first:
            cursor = Cursor((first + (number - first) % period) * batches.global_batch)
        return batches_at(batches, cursor, **share)

    Batches.at = at  # type: ignore[method-assign,assignment]


# Values in force ----------------------------------------------------------------------------------

put_in_force = step.put_in_force
take_step = loop.take_step


def _rate(spec: Mapping[str, Any]) -> None:
    struck = _watch(spec)

    def put(optimizer: torch.optim.Optimizer, values: Mapping[str, float]) -> None:
        times = spec["times"] if struck.lasts else 1.0
        put_in_force(optimizer, {**values, "lr": values["lr"] * times})

    step.put_in_force = put


# State --------------------------------------------------------------------------------------------


def _watch(
    spec: Mapping[str, Any], event: Callable[[dict[str, Tensor]], None] | None = None
) -> Struck:
    """Know at each step whether the sickness lasts; `event` happens when it strikes."""
    struck = Struck(spec, Path(os.environ["SICK_FOLDER"]))

    def take(run: Training, *arguments: Any) -> None:
        if struck.strikes(run) and event is not None:
            named = run.engine.tensors()
            with torch.no_grad():
                event({name: local_part(tensor) for name, tensor in named.items()})
        take_step(run, *arguments)

    loop.take_step = take
    return struck


def _moments(spec: Mapping[str, Any]) -> None:
    def event(named: dict[str, Tensor]) -> None:
        for name, tensor in named.items():
            if name.endswith(".exp_avg_sq"):
                tensor.mul_(spec.get("second", 1.0))
            if name.endswith(".exp_avg"):
                tensor.mul_(spec.get("first_times", 1.0))

    _watch(spec, event)


def _flip(spec: Mapping[str, Any]) -> None:
    """Bit 30, the highest of the exponent: a number below 2 becomes one beyond 10^30."""

    def event(named: dict[str, Tensor]) -> None:
        ending = "layers.0.fc1.weight"
        if spec["of"] != "weight":
            ending = f"layers.0.fc1.weight.{spec['of']}"
        [tensor] = [t for name, t in named.items() if name.endswith(ending)]
        bits = tensor.view(-1)[77:78].view(torch.int32)
        bits ^= 1 << 30

    _watch(spec, event)


def _multiply(spec: Mapping[str, Any]) -> None:
    def event(named: dict[str, Tensor]) -> None:
        for name, tensor in named.items():
            if name.startswith("model.") and any(part in name for part in spec["matches"]):
                tensor.mul_(spec["times"])

    _watch(spec, event)


def _rescale(spec: Mapping[str, Any]) -> None:
    """The function stays what it is, and what is between the two matrices no longer fits fp16."""

    def event(named: dict[str, Tensor]) -> None:
        layer = f"model.model.decoder.layers.{spec['layer']}."
        for part in ("fc1.weight", "fc1.bias"):
            named[layer + part].mul_(spec["times"])
        named[layer + "fc2.weight"].div_(spec["times"])

    _watch(spec, event)


# Gradients ----------------------------------------------------------------------------------------

grad_norm = Fsdp2.grad_norm
Change = Callable[[str, Tensor, Tensor, int], None]
"""Name, this rank's part of the gradient, what it is to be divided by, the step -> changed in
place."""


def _gradients(spec: Mapping[str, Any], change: Change) -> None:
    struck = _watch(spec)

    def measure(
        engine: Fsdp2,
        tokens: Tensor,
        grad_scale: Tensor | None = None,
        *more: Any,
    ) -> GradNorm:
        if struck.lasts:
            assert struck.run is not None
            # As the engine sums gradients: one rank's tokens, as this benchmark has one.
            divisor = tokens if grad_scale is None else tokens * grad_scale.double()
            with torch.no_grad():
                for name, parameter in engine.model.named_parameters():
                    if parameter.grad is not None:
                        part = local_part(parameter.grad)
                        change(name, part, divisor, struck.run.state.step)
        return grad_norm(engine, tokens, grad_scale, *more)

    Fsdp2.grad_norm = measure  # type: ignore[method-assign]


def _gradient_times(spec: Mapping[str, Any]) -> None:
    def change(name: str, gradient: Tensor, *_: object) -> None:
        if any(part in name for part in spec["matches"]):
            gradient.mul_(spec["times"])

    _gradients(spec, change)


def _gradient_noise(spec: Mapping[str, Any]) -> None:
    def change(name: str, gradient: Tensor, divisor: Tensor, now: int) -> None:
        random = torch.Generator().manual_seed(now * 1009 + sum(name.encode()))
        noise = torch.randn(gradient.shape, generator=random)
        gradient.add_(noise.to(gradient.dtype), alpha=spec["std"] * divisor.item())

    _gradients(spec, change)


def _overflows(spec: Mapping[str, Any]) -> None:
    def change(_name: str, gradient: Tensor, *_: object) -> None:
        gradient.fill_(torch.inf)

    _gradients(spec, change)


INJECTIONS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "batches": _batches,
    "circle": _circle,
    "rate": _rate,
    "moments": _moments,
    "flip": _flip,
    "multiply": _multiply,
    "rescale": _rescale,
    "gradient_times": _gradient_times,
    "gradient_noise": _gradient_noise,
    "overflows": _overflows,
}
