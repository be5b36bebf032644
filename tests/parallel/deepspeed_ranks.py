"""One rank of `test_deepspeed.py`: `deepspeed_ranks.py RANK WORLD STORE CASE FOLDER`; prints what
it found.

CASE is JSON: `{"engine", "stage", "compute", "ways", "zero", "parts"}`; with `from` and `as` for
checkpoints in FOLDER, which other processes read. There is one engine a process: the parts,
functions of this file, use it in turn.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opt_train.checkpoint.manifest import read
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.tensors import MODEL as MODEL_PREFIX
from opt_train.data.batches import MicroBatch
from opt_train.optim.adamw import put_in_force, really_in_force
from opt_train.optim.clip import clip, multiply
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import Engine, EngineSpec, MeasuresLayers
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.parallel.measure import loss_over
from tests.optim.syncs import Syncs
from tests.parallel import deepspeed_on_cpu
from tests.parallel.engine_state import described, save_together, world_sum
from tests.parallel.layout_ranks import (
    CPU,
    GLOBAL_BATCH,
    MODEL,
    SEQUENCE,
    STEPS,
    VALUES,
    digest,
    share,
)
from tests.train.leave import leave_with

TIMEOUT = 120.0
STEPS_AFTER = 3
"""How many more show that a restored state trains on as the saved one did."""


class Trainer:
    """The trainer's own parts around an engine, a step at a time."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        self.case, self.folder = case, folder
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        parallel = ParallelConfig(engine=case["engine"], zero_stage=case["stage"], **case["ways"])
        layout = Layout.of(parallel, self.world)
        precision = PrecisionConfig(compute=case["compute"])
        self.engine: Engine = make_engine(
            EngineSpec(
                model=MODEL,
                precision=precision,
                parallel=parallel,
                layout=layout,
                device=CPU,
                values=VALUES,
                seed=3,
            )
        )

    def backward(self, step: int) -> float:
        """Compute the gradients of the batch of `step`; its loss. Every other step has one
        micro-batch of all rows."""
        batches = share(step, self.rank, self.world)
        if step % 2:
            tokens, targets, weights = (
                torch.cat([getattr(batch, name) for batch in batches])
                for name in ("tokens", "targets", "weights")
            )
            batches = [MicroBatch(tokens, targets, weights)]
        loss_sum, _ = self.engine.forward_backward(batches)
        self.tokens = float(sum(batch.weights.sum() for batch in batches)) * SEQUENCE
        return world_sum(float(loss_sum)) / world_sum(self.tokens)

    def update(self) -> dict[str, float]:
        """Apply the gradients or skip them."""
        decision = clip(
            self.engine.grad_norm(torch.tensor(self.tokens, dtype=torch.float64)), VALUES["clip"]
        )
        put_in_force(self.engine.optimizer, VALUES)
        self.engine.apply(decision)
        return {"norm": float(decision.norm), "skip": float(decision.skip)}

    def steps(self, first: int, count: int) -> dict[str, list[float]]:
        recorded: dict[str, list[float]] = {"losses": [], "norms": []}
        for step in range(first, first + count):
            recorded["losses"].append(self.backward(step))
            recorded["norms"].append(self.update()["norm"])
        return recorded

    def evaluate(self) -> float:
        """The loss over one global batch, without gradients."""
        self.engine.model.eval()
        loss_sum, tokens = loss_over(
            self.engine.model, share(99, self.rank, self.world), CPU, lambda done: None
        )
        self.engine.model.train()
        return world_sum(loss_sum) / world_sum(tokens)

    def whole_state(self) -> dict[str, tuple[list[int], str, str]]:
        """Shape, type and hash of each whole tensor of the state, by name."""
        return {name: described(tensor) for name, tensor in self.engine.tensors().items()}

    def own_state(self) -> str:
        """Hash of all that this rank's training carries: fp32 weights, moments and steps, and what
        it computes with."""
        state = self.engine.optimizer.state
        parameters = list(self.engine.model.parameters())
        # In stage 3 the partitions, and what of it is kept whole.
        compute = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
        compute += [
            parameter for parameter in parameters if getattr(parameter, "ds_persist", False)
        ]
        tensors = [
            *compute,
            *(tensor for master, values in state.items() for tensor in (master, *values.values())),
        ]
        return hashlib.sha256(
            b"".join(tensor.detach().float().numpy().tobytes() for tensor in tensors)
        ).hexdigest()

    def save(self, folder: Path) -> None:
        save_together(self.engine, folder)

    def restore(self, folder: Path) -> None:
        restore(self.engine, folder, read(folder))


def curve(trainer: Trainer) -> dict[str, Any]:
    """Initial weights, twenty steps, an evaluation amid them, what is in force at last."""
    initial = {
        name.removeprefix(MODEL_PREFIX): digest(tensor)
        for name, tensor in trainer.engine.tensors().items()
        if name.startswith(MODEL_PREFIX)
    }
    recorded = trainer.steps(0, STEPS // 2)
    evaluation = trainer.evaluate()
    rest = trainer.steps(STEPS // 2, STEPS - STEPS // 2)
    return {
        "initial": initial,
        "losses": recorded["losses"] + rest["losses"],
        "norms": recorded["norms"] + rest["norms"],
        "evaluation": evaluation,
        "in_force": really_in_force(trainer.engine.optimizer),
    }


def layers(trainer: Trainer) -> dict[str, Any]:
    """The world's squares of the layers' norms."""
    trainer.backward(50)
    tokens = torch.tensor(trainer.tokens, dtype=torch.float64)
    grad_norm = trainer.engine.grad_norm(tokens)
    embedding = grad_norm.embedding_squares
    assert embedding is not None
    dist.all_reduce(embedding)
    multiply(trainer.engine.embedding_gradients(), 0.5)
    halved = trainer.engine.grad_norm(tokens)
    multiply(trainer.engine.embedding_gradients(), 2.0)
    assert isinstance(trainer.engine, MeasuresLayers)
    squares = trainer.engine.layer_squares(grad_norm.divisor)
    dist.all_reduce(squares)
    trainer.update()
    return {
        "squares": squares.tolist(),
        "norm": float(grad_norm.norm),
        "embedding": float(embedding),
        "halved": float(halved.norm),
    }


def waits(trainer: Trainer) -> dict[str, Any]:
    """What of a step the host waits for, and how long each of torch's groups waits for its
    ranks."""
    batches, tokens = (
        share(51, trainer.rank, trainer.world),
        torch.tensor(256.0, dtype=torch.float64),
    )
    with Syncs() as syncs:
        trainer.engine.forward_backward(batches)
        trainer.engine.apply(clip(trainer.engine.grad_norm(tokens), VALUES["clip"]))
    groups = dist.distributed_c10d._world.pg_map
    timeouts = [group._get_backend(CPU).options._timeout.total_seconds() for group in groups]
    return {"seen": syncs.seen, "timeouts": timeouts}


def overflow(trainer: Trainer) -> dict[str, Any]:
    """An inf and a NaN in one element of one rank's reduced gradient, on each rank in turn; then a
    step that counts."""
    zero = getattr(trainer.engine, "_zero")  # noqa: B009  the tests' hand between gradient and norm
    parameters = list(trainer.engine.model.parameters())
    skips, untouched, updates = [], [], []
    for turn, (victim, value) in enumerate(
        (v, x) for v in range(trainer.world) for x in ("inf", "nan")
    ):
        trainer.backward(60 + turn)
        before = trainer.own_state()
        if trainer.rank == victim:
            held = [part for part in zero.gradients(parameters) if part.numel()]
            flat = held[turn % len(held)].view(-1)
            flat[turn % len(flat)] = float(value)
        skips.append(trainer.update()["skip"])
        untouched.append(trainer.own_state() == before)
        updates.append(really_in_force(trainer.engine.optimizer)["updates"])
    trainer.backward(80)
    before, last = trainer.own_state(), trainer.update()
    return {
        "skips": skips,
        "untouched": untouched,
        "updates": updates,
        "then": {**last, "changed": trainer.own_state() != before},
    }


def overflow_in_forward(trainer: Trainer) -> dict[str, Any]:
    """A weight of this rank's tokens that is infinite, so that DeepSpeed's own reduction carries
    what is not finite."""
    found = []
    for victim in range(trainer.world):
        batches = share(90, trainer.rank, trainer.world)
        if trainer.rank == victim:
            batches[0].weights[0] = float("inf")
        before = trainer.own_state()
        trainer.engine.forward_backward(batches)
        trainer.tokens = float(GLOBAL_BATCH * SEQUENCE)
        found.append([trainer.update()["skip"], trainer.own_state() == before])
    return {"found": found, "norm after": trainer.steps(91, 1)["norms"]}


def first_of_exchange(trainer: Trainer) -> dict[str, Any]:
    """Save after three steps, train on."""
    trainer.steps(0, 3)
    trainer.save(trainer.folder / "first")
    state = trainer.whole_state()
    return {"state": state, "curve": trainer.steps(3, STEPS_AFTER)}


def exchange(trainer: Trainer) -> dict[str, Any]:
    """Restore what each of `from` saved, over whatever was trained before; save it again `as`;
    train on."""
    found = {}
    for source in trainer.case["from"]:
        trainer.restore(trainer.folder / source)
        state, updates = trainer.whole_state(), really_in_force(trainer.engine.optimizer)["updates"]
        if name := trainer.case.get("as"):
            trainer.save(trainer.folder / name)
        found[source] = {"state": state, "updates": updates, "curve": trainer.steps(3, STEPS_AFTER)}
    return found


PARTS: dict[str, Callable[[Trainer], dict[str, Any]]] = {
    part.__name__: part
    for part in (curve, layers, waits, overflow, overflow_in_forward, first_of_exchange, exchange)
}


def change_settings(zero: dict[str, Any]) -> None:
    """Give DeepSpeed these too, which the product leaves as they are."""
    from opt_train.parallel import deepspeed_engine

    settings_of = vars(deepspeed_engine)["_settings"]

    def settings(*arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = settings_of(*arguments)
        found["zero_optimization"] |= zero
        return found

    replace: Any = setattr
    replace(deepspeed_engine, "_settings", settings)


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    case = json.loads(sys.argv[4])
    if case["engine"] == "deepspeed":
        deepspeed_on_cpu.apply()
        change_settings(case["zero"])
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    trainer = Trainer(case, Path(sys.argv[5]))
    leave_with({part: PARTS[part](trainer) for part in case["parts"]})


if __name__ == "__main__":
    main()
