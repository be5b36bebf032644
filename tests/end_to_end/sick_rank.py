"""The real rank, whose training goes wrong at a chosen place:
`cluster.rank_module=tests.end_to_end.sick_rank`.

`SICK` in the environment is a JSON object:

- `rate`: `[step, times]`: from this step on, in every attempt, the optimizer has so many times the
  learning rate.
- `garbage`: `[first, last]`: the tokens of these batches, wherever they are met, are random.
- `labels`: `[first, last]`: the labels of these batches are their inputs.
- `overflow`: `[first, last]`: behind the backward pass of these steps a gradient is infinite.
"""

import json
import math
import os
from typing import Any

import torch

from opt_train.data.batches import Batches, MicroBatch
from opt_train.data.order import Cursor
from opt_train.optim.clip import local_part
from opt_train.parallel.engine import Sums
from opt_train.parallel.fsdp import Fsdp2
from opt_train.train import step, warm
from opt_train.train.training import Training

SICK: dict[str, Any] = json.loads(os.environ["SICK"])
take_step, batches_at = step.take_step, Batches.at
put_in_force = step.put_in_force
forward_backward = Fsdp2.forward_backward
RUNS: list[Training] = []

import_everything = warm.import_everything


def put_too_much_in_force(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    first, times = SICK["rate"]
    now = next(frame for frame in RUNS).state.step
    put_in_force(optimizer, {**values, "lr": values["lr"] * (times if now >= first else 1)})


def take_step_and_remember(run: Training, *arguments: Any) -> None:
    RUNS[:] = [run]
    take_step(run, *arguments)


def overflowing(engine: Fsdp2, *arguments: Any) -> Sums:
    sums = forward_backward(engine, *arguments)
    first, last = SICK["overflow"]
    if first <= RUNS[0].state.step <= last:
        gradient = next(engine.model.parameters()).grad
        assert gradient is not None
        local_part(gradient).view(-1)[0] = math.inf
    return sums


def garbage_at(batches: Batches, cursor: Cursor, **share: Any) -> list[MicroBatch]:
    micro_batches = batches_at(batches, cursor, **share)
    first, last = SICK["garbage"]
    if first <= cursor.samples // batches.global_batch <= last:
        generator = torch.Generator().manual_seed(cursor.samples)
        for micro_batch in micro_batches:
            micro_batch.tokens.random_(4, 400, generator=generator)
    return micro_batches


def unmoved_at(batches: Batches, cursor: Cursor, **share: Any) -> list[MicroBatch]:
    micro_batches = batches_at(batches, cursor, **share)
    first, last = SICK["labels"]
    if first <= cursor.samples // batches.global_batch <= last:
        for micro_batch in micro_batches:
            micro_batch.targets.copy_(micro_batch.tokens)
    return micro_batches


def main() -> None:
    from opt_train.train import loop

    if "rate" in SICK:
        step.put_in_force = put_too_much_in_force  # type: ignore[assignment]
        loop.take_step = take_step_and_remember  # type: ignore[assignment]
    if "overflow" in SICK:
        Fsdp2.forward_backward = overflowing  # type: ignore[assignment,method-assign]
        loop.take_step = take_step_and_remember  # type: ignore[assignment]
    if "garbage" in SICK:
        Batches.at = garbage_at  # type: ignore[assignment,method-assign]
    if "labels" in SICK:
        Batches.at = unmoved_at  # type: ignore[assignment,method-assign]
    warm.main()


if __name__ == "__main__":
    main()
