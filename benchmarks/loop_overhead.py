"""What the training loop costs beside the training: CPU time that is not forward, backward,
clipping or update.

    python benchmarks/loop_overhead.py            OPT-125M, fp32, one sequence of 512 tokens a step,
    one thread python benchmarks/loop_overhead.py --quick    a tiny model: whether it runs

The real rank trains, alone in this process: batches, orders, signals, the step's word, facts, logs.
CPU time is that of all threads of the process; one thread computes, so that no idle one spins. A
whole period goes from one forward pass to the next. Batches in real runs are larger, which makes
the share smaller: what is beside the training does not grow.
"""

import argparse
import contextlib
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import OPT_125M, QUICK

from opt_train.config.run_config import RunConfig, to_json
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.prepare import prepare
from opt_train.optim.config import OptimConfig
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Metrics
from opt_train.protocol.framing import Message, to_line
from opt_train.train.loop import train
from opt_train.train.orders import NoOrders, StopSignals
from opt_train.train.rank import start
from opt_train.train.saves import Checkpoints
from opt_train.train.validation import Validator

AIM = 0.01
PARTS = ("forward_backward", "grad_norm", "apply")
"""Methods of the engine whose time is training; what is left of a step is the loop's."""


class Stopwatch:
    """CPU seconds of each part, a step at a time."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {name: [] for name in PARTS}
        self.began: list[float] = []
        """When each forward pass began."""

    def around(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        """`part`, timed."""

        def timed(*arguments: Any) -> Any:
            began = time.process_time()
            if name == PARTS[0]:
                self.began.append(began)
            try:
                return part(*arguments)
            finally:
                self.taken[name].append(time.process_time() - began)

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    model, sequence_length = (QUICK, 64) if flags.quick else (OPT_125M, 512)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            name="overhead",
            model=model,
            data=DataConfig(corpus="", sequence_length=sequence_length, validation_fraction=0.1),
            tokenizer=TokenizerConfig(vocab_size=400),
            precision=PrecisionConfig(compute="fp32"),
            optim=OptimConfig(warmup_steps=2),
        )
        config = replace(
            config,
            train=replace(
                config.train,
                steps=flags.steps,
                global_batch=1,
                micro_batch=1,
                threads=1,
                device="cpu",
            ),
            checkpoint=replace(config.checkpoint, every_steps=0),
        )
        watch = measure(config, Path(folder))
    report(config, watch)


def measure(config: RunConfig, folder: Path) -> Stopwatch:
    """Train for the configured steps, without the checkpoint and the validation at the end."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(64):
        words = [f"w{(number * 7 + i * i) % 97} x{i % 13}" for i in range(1000)]
        (corpus / f"{number:02d}.txt").write_text(" ".join(words))
    config = replace(
        config, data=replace(config.data, corpus=str(corpus), directory=str(folder / "prepared"))
    )
    prepare(config.data, config.tokenizer, lambda _line: None)
    path = folder / "config.json"
    path.write_text(to_json(config))
    begin = Begin(
        generation=1,
        attempt="1.00",
        node="alone",
        slot=0,
        rank=0,
        world_size=1,
        local_rank=0,
        store_host="127.0.0.1",
        store_port=0,
        config_path=str(path),
        config_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        run_directory=str(folder),
        checkpoint=None,
        manifest_sha256=None,
        order_number=0,
    )
    watch = Stopwatch()
    Validator.validate_at_end = lambda _self, _state: None  # type: ignore[method-assign]
    Checkpoints.save = lambda _self: True  # type: ignore[method-assign]
    with (folder / "facts").open("wb", buffering=0) as facts, (folder / "log").open("w") as log:

        def publish(fact: Message) -> None:
            facts.write(to_line(fact))  # as a rank does: a line and a system call

        with standard_output_to(log.fileno()):
            run = start(begin, publish, NoOrders(), StopSignals())
            for name in PARTS:
                setattr(run.engine, name, watch.around(name, getattr(run.engine, name)))
            train(run)
        dist.destroy_process_group()
    published = (folder / "facts").read_bytes()
    assert published.count(f'"{Metrics.kind}"'.encode()) >= config.train.steps - 1, (
        "the rank published its metrics"
    )
    return watch


@contextlib.contextmanager
def standard_output_to(descriptor: int) -> Iterator[None]:
    """A rank's log lines go to its standard output, which an agent gave it; so here, for as long as
    it trains."""
    before = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def report(config: RunConfig, watch: Stopwatch) -> None:
    """Print each part's median CPU time and the loop's share. The first two steps warm up."""
    periods = [later - before for before, later in zip(watch.began, watch.began[1:], strict=False)][
        2:
    ]
    parts = {name: taken[2 : 2 + len(periods)] for name, taken in watch.taken.items()}
    rest = [period - sum(part[i] for part in parts.values()) for i, period in enumerate(periods)]
    what = (
        f"{config.model.name}, fp32, {config.train.global_batch} x "
        f"{config.data.sequence_length} tokens"
    )
    print(f"{what}, 1 thread, {len(periods)} steps, torch {torch.__version__}")
    for name, taken in {**parts, "the rest": rest}.items():
        print(f"{name:17} {1000 * statistics.median(taken):9.2f} ms of CPU time a step")
    share = statistics.median(own / period for own, period in zip(rest, periods, strict=True))
    print(f"loop/step: {100 * share:.3f} % of the step's CPU time (aim {100 * AIM:.0f} %)")


if __name__ == "__main__":
    main()
