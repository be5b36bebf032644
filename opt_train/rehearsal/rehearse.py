"""One rank's step rehearsed with tensors that have no contents, in one process, whatever the size
of model and world.

`python -P -m opt_train.rehearsal.rehearse` reads resolved configurations from stdin, a list in
JSON, and prints a `Rehearsal` of each as JSON. It runs the very code of a real run, from
`construct` to the update, over a process group that communicates nothing, and counts what would be
allocated and sent.

CPU kernels stand for a GPU's. Two of them would count what a GPU does not have: dropout's mask is
kept in the type of its input, and attention with dropout keeps its scores. `dropout_of_gpu` does as
a GPU does. Nothing is compiled: blocks that would be run as they are written.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from opt_train.config.builder import build
from opt_train.config.run_config import RunConfig
from opt_train.data.batch_shares import micro_batches_of, share_of
from opt_train.data.batches import MicroBatch
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from opt_train.optim.clip import clip, local_part
from opt_train.optim.in_force import in_force
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.fsdp import Fsdp2, construct
from opt_train.parallel.layout import Layout
from opt_train.rehearsal.counting import CollectiveCount, MemoryCount, Sent, TensorsAtPeak

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What rank 0 holds and sends; bytes."""

    parameters: int
    """Parameters of the whole model."""
    state: dict[str, int]
    """``parameters``, ``gradients`` and ``optimizer``: this rank's shards."""
    kept_for_backward: int
    """What the first micro-batch's forward pass leaves behind, gathered weights of the root
    included."""
    peak: int
    """The most that is allocated at one moment of the step, shards included."""
    peak_phase: str
    """When that is: ``forward``, ``backward`` or ``update``."""
    largest_temporary: int
    """The largest single tensor that is not one of the shards."""
    held_at_peak: list[TensorsAtPeak]
    """The largest of what makes up the peak, without parameters and optimizer state."""
    collectives: list[Sent]


def spec_of(config: RunConfig) -> EngineSpec:
    """What a rehearsal under `config` builds its engine from."""
    return EngineSpec(
        model=config.model,
        precision=config.precision,
        parallel=config.parallel,
        layout=Layout.of(config.parallel, config.world_size),
        device=CPU,
        values=in_force(config, (), 0),
        seed=config.seed,
    )


def rehearse(config: RunConfig, report: Callable[[str], None] = lambda line: None) -> Rehearsal:
    """One step of rank 0 under `config`. Needs a process without a process group.

    Args:
        report: called with a line now and then; the largest models take a minute.
    """
    spec = spec_of(config)
    # torch's fake backend: collectives return at once, so one process stands for rank 0 of any
    # world.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    try:
        with rehearsing() as fake:
            batches = micro_batches(config, spec.layout)
            model = empty_model(spec, fake)
            # Counted too: initialisation could make something larger than the step does.
            drawing = MemoryCount()
            with drawing:
                initialise(model, config.model, config.seed)
            engine = Fsdp2(model, spec)
            memory = MemoryCount()
            memory.count_existing("parameters", model.parameters())
            memory.count_existing("optimizer", moments_of(model, engine.optimizer))
            before_the_step = memory.live
            kept: list[int] = []
            model.register_forward_pre_hook(lambda *_: memory.enter("forward"))
            model.register_forward_hook(lambda *_: memory.enter("backward", kept))
            report(_description(config, batches))
            with CollectiveCount() as collectives, memory:
                # A scale, as fp16 has one: it costs a tensor here and there.
                scale = torch.ones(())
                engine.forward_backward(batches, scale)
                memory.enter("update")
                gradients = _bytes(parameter.grad for parameter in model.parameters())
                norm = engine.grad_norm(torch.ones((), dtype=torch.float64), scale)
                engine.apply(clip(norm, spec.values["clip"]))
            peak = memory.peak()
            return Rehearsal(
                parameters=sum(p.numel() for p in model.parameters()),
                state={
                    "parameters": _bytes(model.parameters()),
                    "gradients": gradients,
                    "optimizer": _bytes(moments_of(model, engine.optimizer)),
                },
                kept_for_backward=kept[0] - before_the_step,
                peak=peak.bytes,
                peak_phase=peak.phase,
                largest_temporary=max(drawing.largest, memory.largest),
                held_at_peak=peak.tensors,
                collectives=collectives.sent(),
            )
    finally:
        dist.destroy_process_group()


@contextmanager
def rehearsing() -> Iterator[FakeTensorMode]:
    """Tensors have no contents, dropout is a GPU's, and nothing is compiled."""
    eager = torch.compiler.set_stance("force_eager")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, dropout_of_gpu(), eager:
        yield fake


def _description(config: RunConfig, batches: list[MicroBatch]) -> str:
    many = "micro-batch" if len(batches) == 1 else "micro-batches"
    return (
        f"rehearsing {config.model.name} with "
        f"activation_checkpointing={config.parallel.activation_checkpointing}: "
        f"{config.model.layers} layers, {len(batches)} {many} of {len(batches[0].tokens)} sequences"
    )


def empty_model(spec: EngineSpec, fake: FakeTensorMode) -> OPT:
    """The model as a rank has it, of fake tensors."""
    # The meta device makes tensors that are fake in a way of their own.
    with unset_fake_temporarily():
        model = construct(spec)
    with fake:
        return model.to_empty(device=CPU)


def micro_batches(config: RunConfig, layout: Layout) -> list[MicroBatch]:
    """As many as rank 0's share of the global batch takes, of the shape that `Batches.at` gives
    them."""
    # Rank 0's share is the largest, and decides the shape for all.
    share = len(share_of(config.train.global_batch, 0, layout.data_world))
    count, rows = micro_batches_of(share, config.train.micro_batch)
    ids = torch.zeros(rows, config.data.sequence_length, dtype=torch.int64)
    return [MicroBatch(ids, ids, torch.ones(rows)) for _ in range(count)]


def moments_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's state that is as large as the parameters."""
    states = (optimizer.state[parameter] for parameter in model.parameters())
    return [
        value
        for state in states
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]


def _bytes(tensors: Iterable[Any]) -> int:
    locals_ = (local_part(tensor) for tensor in tensors if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


@contextmanager
def dropout_of_gpu() -> Iterator[None]:
    """Dropout keeps a mask of one byte an element, and attention makes its own again in the
    backward pass.

    The functions are replaced, because what is computed again in the backward pass sees no
    `TorchFunctionMode`.
    """
    attention = F.scaled_dot_product_attention

    def dropout(hidden: Tensor, probability: float, training: bool) -> Tensor:
        return (
            torch.native_dropout(hidden, probability, True)[0]
            if training and probability
            else hidden
        )

    def undropped(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, _: float, is_causal: bool
    ) -> Tensor:
        return attention(query, key, value, mask, 0.0, is_causal)

    with (
        patch.object(F, "dropout", dropout),
        patch.object(F, "scaled_dot_product_attention", undropped),
    ):
        yield


def main() -> None:
    """One line of JSON a configuration, as soon as it is rehearsed."""
    warnings.filterwarnings("ignore")
    for values in json.load(sys.stdin):
        rehearsal = rehearse(
            build(RunConfig, values), lambda line: print(line, file=sys.stderr, flush=True)
        )
        print(json.dumps(asdict(rehearsal)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # `opt-train plan`, which got it too, answers
        sys.exit(130)
