"""The real rank, in trouble at a chosen place:
`cluster.rank_module=tests.end_to_end.troubled_rank`.

Which trouble is in the environment, `TROUBLE`, a JSON object:

- `pauses`: a list of `[rank, phase, step]`: the rank stops itself (SIGSTOP), once, on entering the
  phase at that step or later.
- `slow_save`: `[step, seconds]`: the save at that step (null: the first) takes so much longer, but
  moves.
- `wrong`: `[rank, step]`: the rank computes something else at that step, once, without a word.
- `rests`: seconds that the rank rests before each step, so that steps are a measure of time.
- `deaf`: true: a rank whose peers died does not notice, as on NCCL; it spins until it is killed.
- `markers`: a folder; what has happened once is marked there and does not happen again.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

from opt_train.checkpoint import background
from opt_train.data.batches import MicroBatch
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Phase
from opt_train.protocol.framing import Message
from opt_train.train import fact_pipe, loop, rank, saves, warm
from opt_train.train.training import Training

TROUBLE: dict[str, Any] = json.loads(os.environ["TROUBLE"])
BEGUN: list[Begin] = []


def once(name: str) -> bool:
    try:
        (Path(TROUBLE["markers"]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pausing(
    publish: Callable[[fact_pipe.FactPipe, Message], None],
) -> Callable[[fact_pipe.FactPipe, Message], None]:
    def publish_and_pause(pipe: fact_pipe.FactPipe, fact: Message) -> None:
        publish(pipe, fact)
        for number, (where, phase, step) in enumerate(TROUBLE.get("pauses", [])):
            if (
                isinstance(fact, Phase)
                and BEGUN
                and (BEGUN[0].rank, fact.phase) == (where, phase)
                and fact.step >= step
                and once(f"pause{number}")
            ):
                os.kill(os.getpid(), signal.SIGSTOP)

    return publish_and_pause


def slow(save: Callable[..., Any]) -> Callable[..., Any]:
    step, seconds = TROUBLE["slow_save"]

    def save_slowly(tensors: Any, state: Mapping[str, Any], folder: Path, **more: Any) -> Any:
        if step in (None, state["counters"]["step"]) and once(f"slow{BEGUN[0].rank}"):
            began = time.monotonic()
            while (gone := time.monotonic() - began) < seconds:
                more["progress"](int(1000 * gone), int(1000 * seconds))
                time.sleep(0.1)
        return save(tensors, state, folder, **more)

    return save_slowly


def wrong(take_step: Callable[..., None]) -> Callable[..., None]:
    where, step = TROUBLE["wrong"]

    def take_another(run: Training, micro_batches: list[MicroBatch], *more: Any) -> None:
        if (run.context.begin.rank, run.state.step) == (where, step) and once("wrong"):
            micro_batches = [
                replace(batch, tokens=batch.tokens.flip(dims=(1,))) for batch in micro_batches
            ]
        take_step(run, micro_batches, *more)

    return take_another


def resting(take_step: Callable[..., None]) -> Callable[..., None]:
    def rest_and_take_step(*arguments: Any) -> None:
        time.sleep(TROUBLE["rests"])
        take_step(*arguments)

    return rest_and_take_step


def deaf(run_rank: Callable[..., int]) -> Callable[..., int]:
    def run_deaf(*arguments: Any) -> int:
        try:
            return run_rank(*arguments)
        except Exception:
            spin()

    return run_deaf


def spin() -> Never:
    while True:
        time.sleep(0.01)


def remembering(run_rank: Callable[..., int]) -> Callable[..., int]:
    def run_and_remember(begin: Begin, *arguments: Any) -> int:
        BEGUN.append(begin)
        return run_rank(begin, *arguments)

    return run_and_remember


import_everything = warm.import_everything


def main() -> None:
    fact_pipe.FactPipe.publish = pausing(fact_pipe.FactPipe.publish)  # type: ignore[method-assign]
    if "slow_save" in TROUBLE:
        saves.save_checkpoint = background.save = slow(background.save)
    if "wrong" in TROUBLE:
        loop.take_step = wrong(loop.take_step)
    if "rests" in TROUBLE:
        loop.take_step = resting(loop.take_step)
    if TROUBLE.get("deaf"):
        rank.run_rank = deaf(rank.run_rank)
    rank.run_rank = remembering(rank.run_rank)
    warm.main()


if __name__ == "__main__":
    main()
