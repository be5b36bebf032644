"""One rank of `test_overflow_anywhere.py`: an inf or NaN in one element of one rank's gradient, on
each rank in turn.

`overflow_ranks.py RANK WORLD STORE CASES`; CASES is JSON, `[[replicate, shard, tensor], precision
changes]` each. Prints what the rank saw, by case.
"""

import hashlib
import json
import math
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import UpdateDecision, clip, predivision
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.train.step import tokens_of
from tests.train.leave import leave_with

CPU = torch.device("cpu")
TINY = ModelConfig(
    name="tiny",
    layers=1,
    heads=4,
    d_model=32,
    ffn=64,
    vocab_size=64,
    positions=16,
    dropout=0.0,
    init_std=0.05,
)
VALUES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


class Trainer:
    """The trainer's own parts, step by step, with a hand in between gradient and norm."""

    def __init__(self, layout: Layout, precision: PrecisionConfig, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.engine = make_engine(
            EngineSpec(
                model=TINY,
                precision=precision,
                parallel=ParallelConfig(),
                layout=layout,
                device=CPU,
                values=VALUES,
                seed=3,
            )
        )
        self.scale = LossScale(policy_of(precision), CPU)
        self.predivision = predivision(
            precision.predivide and precision.compute == "fp16", layout.data_world
        )
        self.step = 0

    def backward(self) -> None:
        self.step += 1
        blocks = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(self.step))
        mine = blocks[self.layout.data_rank(self.rank) :: self.layout.data_world]
        batch = MicroBatch(mine[:, :-1], mine[:, 1:], torch.ones(len(mine)))
        self.grad_scale = self.scale.scale * self.predivision
        self.engine.forward_backward([batch], self.grad_scale)
        self.tokens = tokens_of([batch]) / self.layout.tensor

    def update(self) -> UpdateDecision:
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        decision = clip(self.engine.grad_norm(tokens, self.grad_scale), 0.5)
        put_in_force(self.engine.optimizer, VALUES)
        self.engine.apply(decision)
        self.scale.update(decision.skip)
        return decision

    def norm_by_hand(self) -> float:
        """Of the whole gradient, gathered, averaged over the 8 x 16 tokens."""
        wholes = [
            whole(p.grad).double() for p in self.engine.model.parameters() if p.grad is not None
        ]
        return (
            math.sqrt(sum(float(grad.square().sum()) for grad in wholes))
            / 128
            / float(self.grad_scale)
        )

    def digest(self) -> str:
        """Of all that training carries on this rank."""
        tensors = [
            t
            for p in self.engine.model.parameters()
            for t in (p, *self.engine.optimizer.state[p].values())
        ]
        return hashlib.sha256(
            b"".join(local(t).detach().numpy().tobytes() for t in tensors)
        ).hexdigest()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plant(model: nn.Module, value: float, turn: int) -> None:
    """Into one element of one gradient of this rank, another one each time."""
    held = [p.grad for p in model.parameters() if p.grad is not None and local(p.grad).numel()]
    flat = local(held[turn % len(held)]).view(-1)
    flat[turn % len(flat)] = value


def record(layout: Layout, precision: PrecisionConfig, rank: int) -> dict[str, Any]:
    trainer = Trainer(layout, precision, rank)
    norms, by_hand = [], []
    for _ in range(2):
        trainer.backward()
        by_hand.append(trainer.norm_by_hand())
        norms.append(float(trainer.update().norm))
    skips, scales, untouched = [], [], []
    turns = [(victim, value) for victim in range(layout.world_size) for value in ("inf", "nan")]
    for turn, (victim, value) in enumerate(turns):
        trainer.backward()
        before = trainer.digest()
        if rank == victim:
            plant(trainer.engine.model, float(value), turn)
        skips.append(float(trainer.update().skip))
        scales.append(float(trainer.scale.scale))
        untouched.append(trainer.digest() == before)
    trainer.backward()
    before, last = trainer.digest(), trainer.update()
    return {
        "norms": norms,
        "by_hand": by_hand,
        "skips": skips,
        "scales": scales,
        "untouched": untouched,
        "then": {
            "skip": float(last.skip),
            "changed": trainer.digest() != before,
            "norm": float(last.norm),
        },
    }


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    records = [
        record(Layout(*degrees), PrecisionConfig(**changes), rank)
        for degrees, changes in json.loads(sys.argv[4])
    ]
    leave_with(records)


if __name__ == "__main__":
    main()
