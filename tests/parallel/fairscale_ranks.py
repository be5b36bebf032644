"""One rank of `test_fairscale.py`: `fairscale_ranks.py RANK WORLD STORE PARTS FOLDER`; prints what
it found, by part.

PARTS is a JSON object: a part is a function of this file, called with FOLDER, which is for
checkpoints that another world size may read, and with what stands there for it.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel

from opt_train.checkpoint.manifest import read
from opt_train.checkpoint.restore import restore
from opt_train.data.batches import MicroBatch
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import clip, predivision
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import Engine, EngineSpec, MeasuresLayers
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.parallel.measure import loss_over
from tests.optim.overflow_ranks import plant
from tests.optim.syncs import Syncs
from tests.parallel import fairscale_on_cpu
from tests.parallel.engine_state import described, save_together, world_sum
from tests.parallel.layout_ranks import (
    CPU,
    GLOBAL_BATCH,
    MODEL,
    SEQUENCE,
    VALUES,
    global_batch,
    share,
    train,
)
from tests.train.leave import leave_with

PRECISIONS = {
    "fp32": PrecisionConfig(compute="fp32"),
    "bf16": PrecisionConfig(compute="bf16"),
    "fp16": PrecisionConfig(compute="fp16", loss_scale_initial=64.0),
    # Where it begins, gradients overflow: the scale must find its place in the same steps.
    "overflowing fp16": PrecisionConfig(compute="fp16", loss_scale_initial=2.0**20),
    "memory-efficient fp16": PrecisionConfig(
        compute="fp16", weights="fp16", loss_scale_initial=64.0
    ),
}
NARROW = [name for name in PRECISIONS if name != "fp32"]


class Trainer:
    """The trainer's own parts around an engine, a step at a time."""

    def __init__(
        self, engine: str, precision: PrecisionConfig, seed: int | None = 3, **ways: Any
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        parallel = ParallelConfig(engine=engine, **ways)
        layout = Layout.of(parallel, self.world)
        self.engine: Engine = make_engine(
            EngineSpec(
                model=MODEL,
                precision=precision,
                parallel=parallel,
                layout=layout,
                device=CPU,
                values=VALUES,
                seed=seed,
            )
        )
        self.scale = LossScale(policy_of(precision), CPU)
        self.predivision = predivision(
            precision.predivide and precision.compute == "fp16", self.world
        )

    def backward(self, step: int) -> float:
        """Compute the gradients of the batch of `step`; its loss."""
        batches = share(step, self.rank, self.world)
        self.grad_scale = self.scale.scale * self.predivision
        loss_sum, _ = self.engine.forward_backward(batches, self.grad_scale)
        self.tokens = float(sum(batch.weights.sum() for batch in batches)) * SEQUENCE
        return world_sum(float(loss_sum)) / world_sum(self.tokens)

    def update(self) -> dict[str, float]:
        """Apply the gradients or skip them."""
        grad_norm = self.engine.grad_norm(
            torch.tensor(self.tokens, dtype=torch.float64), self.grad_scale
        )
        decision = clip(grad_norm, VALUES["clip"])
        put_in_force(self.engine.optimizer, VALUES)
        self.engine.apply(decision)
        self.scale.update(decision.skip)
        return {"norm": float(decision.norm), "skip": float(decision.skip)}

    def steps(self, first: int, count: int) -> dict[str, list[float]]:
        recorded: dict[str, list[float]] = {"losses": [], "norms": [], "skips": []}
        for step in range(first, first + count):
            recorded["losses"].append(self.backward(step))
            found = self.update()
            recorded["norms"].append(found["norm"])
            recorded["skips"].append(found["skip"])
        return recorded

    def evaluate(self) -> float:
        """The loss over one global batch, without gradients."""
        blocks = global_batch(99)[self.rank :: self.world]
        rows = -(-GLOBAL_BATCH // self.world)
        weights = torch.tensor([1.0] * len(blocks) + [0.0] * (rows - len(blocks)))
        padded = torch.cat([blocks, blocks[: rows - len(blocks)]])
        self.engine.model.eval()
        batch = MicroBatch(padded[:, :-1], padded[:, 1:], weights)
        loss_sum, tokens = loss_over(self.engine.model, [batch], CPU, lambda done: None)
        self.engine.model.train()
        return world_sum(loss_sum) / world_sum(tokens)

    def whole_state(self) -> dict[str, tuple[list[int], str, str]]:
        """Shape, type and hash of each whole tensor of the state, by name."""
        return {name: described(tensor) for name, tensor in self.engine.tensors().items()}

    def own_state(self) -> str:
        """Hash of all that this rank's training carries."""
        model, state = self.engine.model, self.engine.optimizer.state
        tensors = [
            tensor for shard in model.parameters() for tensor in (shard, *state[shard].values())
        ]
        return hashlib.sha256(
            b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
        ).hexdigest()

    def save(self, folder: Path) -> None:
        save_together(self.engine, folder)

    def restore(self, folder: Path) -> None:
        restore(self.engine, folder, read(folder))


def textbook(folder: Path, ways: list[str], steps: int) -> dict[str, Any]:
    """fp32, gradients added up in each of `ways`."""
    layout = Layout(1, dist.get_world_size(), 1)
    return {
        accumulate: train(
            layout,
            ParallelConfig(engine="fairscale", accumulate=accumulate),
            MODEL,
            dist.get_rank(),
            steps,
        )
        for accumulate in ways
    }


def beside_fsdp2(folder: Path, cases: list[tuple[str, str]], steps: int) -> dict[str, Any]:
    """The same steps with both engines, in each case of precision and way to add up."""
    return {
        f"{name} {accumulate}": {
            engine: Trainer(engine, PRECISIONS[name], accumulate=accumulate).steps(0, steps)
            for engine in ("fsdp2", "fairscale")
        }
        for name, accumulate in cases
    }


def recomputed(folder: Path) -> dict[str, Any]:
    """bf16 with all that is kept, all computed again, attention alone, and compiled."""
    found = {"none": Trainer("fairscale", PRECISIONS["bf16"]).steps(0, 4)}
    for mode in ("full", "selective"):
        found[mode] = Trainer("fairscale", PRECISIONS["bf16"], activation_checkpointing=mode).steps(
            0, 4
        )
    for mode in ("none", "full", "selective"):
        torch.compiler.reset()
        trainer = Trainer(
            "fairscale", PRECISIONS["bf16"], activation_checkpointing=mode, compile=True
        )
        found[f"{mode} compiled"] = trainer.steps(0, 4)
    return found


def overflow(folder: Path, precisions: list[str]) -> dict[str, Any]:
    """An inf and a NaN in one element of one rank's gradient, on each rank in turn."""
    found = {}
    for name in precisions:
        trainer = Trainer("fairscale", PRECISIONS[name])
        trainer.backward(0)
        gradients = [
            shard.grad for shard in trainer.engine.model.parameters() if shard.grad is not None
        ]
        squares = float(sum(gradient.double().square().sum() for gradient in gradients))
        by_hand = (
            math.sqrt(world_sum(squares)) / world_sum(trainer.tokens) / float(trainer.grad_scale)
        )
        first = trainer.update()
        recorded, untouched = [], []
        turns = [(victim, value) for victim in range(trainer.world) for value in ("inf", "nan")]
        for turn, (victim, value) in enumerate(turns):
            trainer.backward(turn + 1)
            before = trainer.own_state()
            if trainer.rank == victim:
                plant(trainer.engine.model, float(value), turn)
            recorded.append(trainer.update()["skip"])
            untouched.append(trainer.own_state() == before)
        trainer.backward(20)
        before, last = trainer.own_state(), trainer.update()
        found[name] = {
            "norm": first["norm"],
            "by_hand": by_hand,
            "skips": recorded,
            "untouched": untouched,
            "scale": float(trainer.scale.scale),
            "then": {**last, "changed": trainer.own_state() != before},
        }
    return found


def exchange(folder: Path, precisions: list[str]) -> dict[str, Any]:
    """fsdp2 saves; fairscale restores after other steps and an evaluation, saves; fsdp2 restores
    that."""
    found = {}
    for name in precisions:
        precision, root = PRECISIONS[name], folder / name
        root.mkdir(exist_ok=True)
        first = Trainer("fsdp2", precision)
        first.steps(0, 3)
        first.save(root / "fsdp2")
        recorded = {"fsdp2": [first.whole_state(), first.steps(3, 3)]}

        second = Trainer("fairscale", precision, seed=5)
        second.steps(50, 2)
        second.evaluate()
        second.restore(root / "fsdp2")
        second.save(root / "fairscale")
        recorded["fairscale"] = [second.whole_state(), second.steps(3, 3)]

        third = Trainer("fsdp2", precision, seed=None)
        third.restore(root / "fairscale")
        recorded["fsdp2 again"] = [third.whole_state(), third.steps(3, 3)]
        found[name] = recorded
    return found


def exchanged_elsewhere(folder: Path, precisions: list[str]) -> dict[str, Any]:
    """What `exchange` saved, each read by the other engine on another number of ranks."""
    found = {}
    for name in precisions:
        recorded = {}
        for engine, source in (("fairscale", "fsdp2"), ("fsdp2", "fairscale")):
            trainer = Trainer(engine, PRECISIONS[name], seed=None)
            trainer.restore(folder / name / source)
            recorded[engine] = [trainer.whole_state(), trainer.steps(3, 3)]
        found[name] = recorded
    return found


def evaluated(folder: Path, precisions: list[str]) -> dict[str, Any]:
    """Losses of training, with an evaluation after every other step and without."""
    found: dict[str, Any] = {}
    for name in precisions:
        undisturbed, disturbed = (Trainer("fairscale", PRECISIONS[name]) for _ in range(2))
        found[name] = {
            "undisturbed": undisturbed.steps(0, 6)["losses"],
            "disturbed": [],
            "evaluations": [],
        }
        for step in range(0, 6, 2):
            found[name]["disturbed"] += disturbed.steps(step, 2)["losses"]
            found[name]["evaluations"].append(disturbed.evaluate())
        reference = Trainer("fsdp2", PRECISIONS[name])
        reference.steps(0, 6)
        found[name]["reference"] = reference.evaluate()
    return found


def hooks(folder: Path, precisions: list[str]) -> dict[str, Any]:
    """How often fairscale's hook runs in each step."""
    hook = FullyShardedDataParallel._post_backward_hook
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return hook(*arguments)

    found: dict[str, list[int]] = {}
    FullyShardedDataParallel._post_backward_hook = counted
    for name in precisions:
        trainer, found[name] = Trainer("fairscale", PRECISIONS[name]), []
        for step in range(4):
            calls = 0
            trainer.steps(step, 1)
            found[name].append(calls)
    FullyShardedDataParallel._post_backward_hook = hook
    return found


def waits(folder: Path) -> dict[str, Any]:
    """What makes the host wait for its device in a step, by precision."""
    found = {}
    for name in ("bf16", "memory-efficient fp16"):
        trainer = Trainer("fairscale", PRECISIONS[name], accumulate="whole")
        trainer.steps(0, 1)
        batches, tokens = (
            share(1, trainer.rank, trainer.world),
            torch.tensor(trainer.tokens, dtype=torch.float64),
        )
        with Syncs() as syncs:
            trainer.engine.forward_backward(batches, trainer.grad_scale)
            trainer.engine.apply(
                clip(trainer.engine.grad_norm(tokens, trainer.grad_scale), VALUES["clip"])
            )
        found[name] = syncs.seen
    return found


def layer_norms(folder: Path) -> dict[str, Any]:
    """The world's squares of the layers' norms, with both engines."""
    found: dict[str, Any] = {}
    for engine in ("fsdp2", "fairscale"):
        trainer = Trainer(engine, PRECISIONS["fp32"])
        trainer.backward(0)
        assert isinstance(trainer.engine, MeasuresLayers)
        squares = trainer.engine.layer_squares(torch.tensor(1.0, dtype=torch.float64))
        dist.all_reduce(squares)
        found[engine] = squares.tolist()
    return found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    part.__name__: part
    for part in (
        textbook,
        beside_fsdp2,
        recomputed,
        overflow,
        exchange,
        exchanged_elsewhere,
        evaluated,
        hooks,
        waits,
        layer_norms,
    )
}


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    fairscale_on_cpu.apply()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    parts, folder = json.loads(sys.argv[4]), Path(sys.argv[5])
    found = {part: PARTS[part](folder, **arguments) for part, arguments in parts.items()}
    leave_with(found)


if __name__ == "__main__":
    main()
