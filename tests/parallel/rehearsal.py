"""One rank's step rehearsed with tensors that have no contents, in one process, whatever the size of model and world.

`rehearsal.py RANK WORLD STORE OVERRIDES` prints JSON, for `run_script` with one process. It runs the very code of a
real run, from `construct` to the optimizer, over a process group that communicates nothing, and counts what would be
allocated and sent. CPU kernels stand for a GPU's; dropout is off: a CPU's attention with it would keep its scores.
"""

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from opt_train.config import RunConfig, compose
from opt_train.data.batches import MicroBatch, share_of
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from opt_train.optim.clip import clip
from opt_train.optim.in_force import in_force
from opt_train.parallel.fsdp import Fsdp2, construct
from opt_train.parallel.layout import Layout

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Sent:
    """Collectives of one kind that one rank takes part in during a step."""

    kind: str
    """``all_gather``, ``reduce_scatter`` or ``all_reduce``."""
    ranks: int
    """The group's size."""
    bytes: int
    """Of the whole tensor that is gathered, scattered or reduced, over all of them."""
    count: int


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What rank 0 holds and sends; bytes."""

    parameters: int
    """Parameters of the whole model."""
    state: dict[str, int]
    """``parameters``, ``gradients`` and ``optimizer``: this rank's shards."""
    peak: dict[str, int]
    """Everything allocated at the moment of the peak, by kind, as `FSDPMemTracker` names them, and its ``Total``."""
    largest_temporary: int
    """The largest single tensor that is not one of the shards."""
    collectives: list[Sent]


def rehearse(config: RunConfig, world_size: int) -> Rehearsal:
    """One step of rank 0 under `config` in a world of `world_size`. Needs a process without a process group."""
    config = replace(config, model=replace(config.model, dropout=0.0))
    layout = Layout.of(config.parallel, world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            batches = _micro_batches(config, layout)
            # One layer fills DTensor's caches, for which it tries each operation on whole tensors.
            values, accumulate = in_force(config, (), 0), config.parallel.accumulate
            small = _empty(replace(config, model=replace(config.model, layers=1)), layout, fake)
            Fsdp2(small, CPU, values, accumulate).forward_backward(batches)
            model = _empty(config, layout, fake)
            with _Largest() as drawn:
                initialise(model, config.model, config.seed)
            engine = Fsdp2(model, CPU, values, accumulate)
            tokens = torch.ones((), dtype=torch.float64)
            tracker = FSDPMemTracker(model, engine.optimizer)
            with _Collectives() as collectives, _Largest() as largest:
                with tracker:
                    engine.forward_backward(batches)
                    gradients = _bytes(p.grad for p in model.parameters())
                    verdict = clip(engine.grad_norm(tokens), values["clip"])
                # The tracker takes the optimizer's DTensors for whole tensors; the fused update allocates nothing.
                engine.apply(verdict)
            (peak,) = tracker.get_tracker_snapshot("peak").values()
            return Rehearsal(
                parameters=sum(p.numel() for p in model.parameters()),
                state={
                    "parameters": _bytes(model.parameters()),
                    "gradients": gradients,
                    "optimizer": _bytes(_moments(model, engine.optimizer)),
                },
                peak={getattr(kind, "value", str(kind)): size for kind, size in peak.items()},
                largest_temporary=max(drawn.bytes, largest.bytes),
                collectives=collectives.sent(),
            )
    finally:
        dist.destroy_process_group()


def _empty(config: RunConfig, layout: Layout, fake: FakeTensorMode) -> OPT:
    """The model as a rank has it, of fake tensors."""
    parallel = replace(config.parallel, compile=False)
    with unset_fake_temporarily():  # the meta device makes tensors that are fake in a way of their own
        model = construct(config.model, config.precision, parallel, layout, CPU)
    with fake:
        return model.to_empty(device=CPU)


def _micro_batches(config: RunConfig, layout: Layout) -> list[MicroBatch]:
    length = config.data.sequence_length
    share = len(share_of(config.train.global_batch, 0, layout.data_world))
    rows = min(config.train.micro_batch, share)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return [MicroBatch(ids, ids, torch.ones(rows)) for _ in range(math.ceil(share / rows))]


def _moments(model: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    states = (optimizer.state[parameter] for parameter in model.parameters())
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]


def _bytes(tensors: Any) -> int:
    locals_ = (tensor.to_local() for tensor in tensors if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            # A DTensor has the size of the whole; its part comes by on its own.
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and not value._is_view():
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


class _Collectives(TorchDispatchMode):
    """Counts collectives by kind and group, at whichever of torch's two interfaces they are asked for."""

    KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[tuple[str, int]] = Counter()
        self._bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            flat = name.strip("_").replace("_", "")
            kind = next(kind for kind in self.KINDS if flat.startswith(kind.replace("_", "")))
            key = (kind, _ranks(args))
            self._count[key] += 1
            self._bytes[key] += max(_sizes((args, result)))
        return result

    def sent(self) -> list[Sent]:
        return [Sent(kind, ranks, self._bytes[kind, ranks], count) for (kind, ranks), count in self._count.items()]


def _ranks(args: Any) -> int:
    for value in args:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return dist.distributed_c10d._resolve_process_group(value).size()
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
    raise AssertionError(f"a collective without a group: {args}")


def _sizes(values: Any) -> list[int]:
    if isinstance(values, torch.Tensor):
        return [values.numel() * values.element_size()]
    if isinstance(values, (tuple, list)):
        return [sum(_sizes(value)) if isinstance(value, list) else max(_sizes(value), default=0) for value in values]
    return []


def main() -> None:
    warnings.filterwarnings("ignore")
    config = compose(json.loads(sys.argv[4]))
    print(json.dumps(asdict(rehearse(config, config.world_size))))


if __name__ == "__main__":
    main()
