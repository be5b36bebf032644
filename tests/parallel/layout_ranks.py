"""One rank of the layout suite: `layout_ranks.py RANK WORLD STORE CASES`; prints one JSON object,
the curves by case.

A case is the JSON list `[name, [replicate, shard, tensor], parallel changes, model changes,
steps]`. Every case trains the same model on the same global batches with the trainer's own parts.
"""

import json
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from opt_train.checkpoint.tensors import MODEL as MODEL_PREFIX
from opt_train.data.batch_shares import share_of
from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import clip
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from tests.train.leave import leave_with

CPU = torch.device("cpu")
MODEL = ModelConfig(
    name="tiny",
    layers=2,
    heads=4,
    d_model=64,
    ffn=128,
    vocab_size=520,
    positions=34,
    dropout=0.0,
    init_std=0.02,
)
STEPS, GLOBAL_BATCH, SEQUENCE = 20, 8, 32
TIMEOUT_SECONDS = 120.0
VALUES = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 0.5}


def global_batch(step: int) -> torch.Tensor:
    """Ids [GLOBAL_BATCH, SEQUENCE + 1]; small ones are frequent, which is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    skewed = torch.rand(GLOBAL_BATCH, SEQUENCE + 1, generator=generator) ** 4
    return (skewed * MODEL.vocab_size).long()


def share(step: int, data_rank: int, data_world: int) -> list[MicroBatch]:
    """A data rank's share in two micro-batches, padded with sequences of weight 0 where others have
    more."""
    blocks = global_batch(step)
    mine = list(share_of(GLOBAL_BATCH, data_rank, data_world))
    largest = len(share_of(GLOBAL_BATCH, 0, data_world))
    rows = -(-largest // 2)
    batches = []
    for first in range(0, largest, rows):
        numbers = mine[first : first + rows]
        padded = blocks[numbers + [0] * (rows - len(numbers))]
        weights = torch.tensor([1.0] * len(numbers) + [0.0] * (rows - len(numbers)))
        batches.append(MicroBatch(padded[:, :-1], padded[:, 1:], weights))
    return batches


def train(
    layout: Layout, parallel: ParallelConfig, config: ModelConfig, rank: int, steps: int = STEPS
) -> dict[str, Any]:
    """Losses and gradient norms of the first steps, sums that tell initial weights apart, and
    groups' timeouts."""
    engine = make_engine(
        EngineSpec(
            model=config,
            precision=PrecisionConfig(compute="fp32"),
            parallel=parallel,
            layout=layout,
            device=CPU,
            values=VALUES,
            seed=3,
        )
    )
    initial = {
        name.removeprefix(MODEL_PREFIX): digest(tensor)
        for name, tensor in engine.tensors().items()
        if name.startswith(MODEL_PREFIX)
    }
    losses, norms, activations = [], [], []
    for step in range(steps):
        batches = share(step, layout.data_rank(rank), layout.data_world)
        loss_sum, squares = engine.forward_backward(batches)
        tokens = float(sum(batch.weights.sum() for batch in batches)) * SEQUENCE
        sums = torch.tensor([float(loss_sum), float(squares), tokens], dtype=torch.float64)
        dist.all_reduce(sums)
        loss, square, _ = (sums / sums[2]).tolist()
        losses.append(loss)
        activations.append(square**0.5)
        weight = torch.tensor(tokens / layout.tensor, dtype=torch.float64)
        decision = clip(engine.grad_norm(weight), VALUES["clip"])
        norms.append(float(decision.norm))
        put_in_force(engine.optimizer, VALUES)
        engine.apply(decision)
    groups = dist.distributed_c10d._world.pg_map
    timeouts = [group._get_backend(CPU).options._timeout.total_seconds() for group in groups]
    return {
        "losses": losses,
        "norms": norms,
        "activations": activations,
        "initial": initial,
        "timeouts": timeouts,
    }


def digest(parameter: torch.Tensor) -> list[float]:
    """Two sums over a whole parameter that any change of place shows in."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    flat = whole.detach().double().flatten()
    return [float(flat.sum()), float((flat * torch.arange(len(flat))).sum())]


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    curves = {}
    for name, degrees, ways, changes, steps in json.loads(sys.argv[4]):
        began = time.monotonic()
        torch.compiler.reset()
        curves[name] = train(
            Layout(*degrees), ParallelConfig(**ways), replace(MODEL, **changes), rank, steps
        )
        curves[name]["seconds"] = time.monotonic() - began
    leave_with(curves if rank == 0 else {})


if __name__ == "__main__":
    main()
