"""What the benchmarks of saving train beside it: one rank's engine, its step, and a plain copy of
its state."""

import time
from typing import Protocol

import torch
import torch.distributed as dist
from contestants import OPT_125M, QUICK, VALUES, micro_batch

from opt_train.data.batches import MicroBatch
from opt_train.optim.clip import clip
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine

CPU = torch.device("cpu")


class Copying(Protocol):
    def wait_copied(self) -> None:
        """Return when the tensors may change."""


class SavedModel:
    """OPT-125M in fp32 on one rank, sequences of 512; a tiny model if `quick`."""

    def __init__(self, quick: bool) -> None:
        torch.set_num_threads(2)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        config, length = (QUICK, 64) if quick else (OPT_125M, 512)
        self.engine = make_engine(
            EngineSpec(
                model=config,
                precision=PrecisionConfig(compute="fp32"),
                parallel=ParallelConfig(),
                layout=Layout(1, 1, 1),
                device=CPU,
                values=VALUES,
                seed=0,
            )
        )
        tokens, targets = micro_batch(config, 1, length)
        self._batch = MicroBatch(tokens, targets, torch.ones(1))
        self._weight = torch.tensor(float(tokens.numel()), dtype=torch.float64)
        self._copies: dict[str, torch.Tensor] = {}
        self.bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in self.engine.tensors().values()
        )
        self.waited = 0.0
        """Seconds for which the last step's update waited for a copy."""

    def step(self, copying: Copying | None = None) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.engine.forward_backward([self._batch])
        decision = clip(self.engine.grad_norm(self._weight), 1.0)
        waits = time.perf_counter()
        if copying is not None:
            copying.wait_copied()
        self.waited = time.perf_counter() - waits
        self.engine.apply(decision)
        return time.perf_counter() - began

    def copy(self) -> float:
        """Seconds of a plain copy of the state, into tensors that have been written before."""
        if not self._copies:
            self._copies = {name: tensor.clone() for name, tensor in self.engine.tensors().items()}
        began = time.perf_counter()
        for name, tensor in self.engine.tensors().items():
            self._copies[name].copy_(tensor)
        return time.perf_counter() - began
