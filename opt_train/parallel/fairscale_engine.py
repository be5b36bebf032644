"""The model spread over ranks with fairscale's FullyShardedDataParallel: the engine that OPT was
trained on.

Why it is done so, and what it costs, stands in docs/decisions/fairscale.md.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel
from fairscale.nn.data_parallel.fully_sharded_data_parallel import get_fsdp_instances
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from opt_train.checkpoint.tensors import MODEL, OPTIMIZER
from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Block
from opt_train.model.init import Progress, initialise
from opt_train.optim.adamw import apply, make_optimizer, put_in_force
from opt_train.optim.clip import GradNorm, UpdateDecision, global_norm
from opt_train.optim.per_layer_norms import LayerSquares
from opt_train.parallel.engine import EngineSpec, Sums, loss_of
from opt_train.parallel.fsdp import TYPES, make_mesh
from opt_train.parallel.layout import Layout
from opt_train.parallel.recompute import recompute_and_compile
from opt_train.parallel.rows import own_rows, whole_of
from opt_train.protocol.exits import BadInput

DEVICES = frozenset(("cuda",))
"""What fairscale's streams are known to run on."""


class Fairscale:
    """`Engine` with fairscale's sharding over all ranks; `MeasuresLayers` too.

    A rank holds its part of each parameter, a flat piece of it, and of optimizer and gradients the
    same. While it is built, one block at a time exists whole and without values, and at last what
    lies outside the blocks (embeddings and the final LayerNorm); values are drawn into the shards
    afterwards, of a parameter at a time.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Build the model as it trains, with torch's optimizer. Needs a process group.

        Raises:
            BadInput: `spec.device` is no GPU.
        """
        device = spec.device
        if device.type not in DEVICES:
            raise BadInput(
                f"parallel.engine=fairscale needs a GPU and was given {device}; use "
                "parallel.engine=fsdp2"
            )
        self._device = device
        self._accumulate = spec.parallel.accumulate
        self._mesh = make_mesh(Layout(1, dist.get_world_size(), 1), device)
        # fairscale was written for an older torch; this one warns at every storage and every
        # collective.
        warnings.filterwarnings(
            "ignore", category=UserWarning, message="TypedStorage is deprecated"
        )
        warnings.filterwarnings(
            "ignore", category=FutureWarning, message=r"`torch\.distributed\._\w+_base`"
        )
        with torch.device("meta"):
            model = OPT(spec.model).to(TYPES[spec.precision.weights])
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.model: FullyShardedDataParallel = _shard(model, spec)
        self._shards: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        assert self._shards.keys() == self._shapes.keys()
        if spec.seed is not None:
            self._initialise(spec.model, spec.seed, spec.progress)
        self.optimizer = self._make_optimizer(spec.values)
        self._layers = LayerSquares(
            list(self._shards), [1] * len(self._shards), spec.model.layers, device
        )

    def _make_optimizer(self, values: Mapping[str, float]) -> Optimizer:
        optimizer = make_optimizer(self.model, values)
        # Shards are flat, so only the shapes know which of them are matrices and decay.
        matrices = [shard for name, shard in self._shards.items() if len(self._shapes[name]) >= 2]
        vectors = [shard for name, shard in self._shards.items() if len(self._shapes[name]) < 2]
        for group in optimizer.param_groups:
            group["params"] = matrices if group["decayed"] else vectors
        put_in_force(optimizer, values)
        return optimizer

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], grad_scale: Tensor | None = None
    ) -> Sums:
        """See `Engine`."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        activation_squares = torch.zeros((), dtype=torch.float32, device=self._device)
        for number, batch in enumerate(micro_batches, start=1):
            sums = self._add_gradients(batch, grad_scale, last=number == len(micro_batches))
            loss_sum += sums.loss_sum
            activation_squares += sums.activation_squares
        return Sums(loss_sum, activation_squares)

    def _add_gradients(self, batch: MicroBatch, grad_scale: Tensor | None, last: bool) -> Sums:
        """Of one micro-batch, which are then summed over ranks or, with accumulate=whole, wait for
        the last one's."""
        reduces = last or self._accumulate == "shards"
        with nullcontext() if reduces else self.model.no_sync():
            loss = loss_of(self.model, batch, self._device, grad_scale)
            # torch's stubs leave backward untyped.
            loss.loss_sum.backward()  # type: ignore[no-untyped-call]
        self._tidy(reduces)
        return Sums(loss.loss_sum.detach(), loss.activation_squares)

    def _tidy(self, reduced: bool) -> None:
        """What fairscale leaves behind after a backward."""
        for shard in self._shards.values():
            # Each forward registers another hook on the same node, unless the weights change their
            # type in between: step after step more of them would run.
            del shard._shard_bwd_hook  # type: ignore[attr-defined]  # fairscale's
            if not reduced and shard.grad is not None:
                # What micro-batches add up is kept in the weights' type, not in that of the
                # computation.
                shard.grad.data = shard.grad.data.to(shard.dtype)

    def embedding_gradients(self) -> list[Tensor]:
        """See `Engine`."""
        gradients = [shard.grad for shard in self._shards.values()]
        found = (gradients[number] for number in self._layers.embedding)
        return [gradient for gradient in found if gradient is not None]

    def grad_norm(
        self, tokens: Tensor, grad_scale: Tensor | None = None, loss_sum: Tensor | None = None
    ) -> GradNorm:
        """See `Engine`."""
        # The zeros that pad some shards count for nothing.
        parts = [shard.grad for shard in self._shards.values() if shard.grad is not None]
        copies, embedding = [1] * len(parts), self._layers.embedding
        return global_norm(parts, copies, tokens, grad_scale, loss_sum, embedding)

    def weights(self) -> list[Tensor]:
        """See `MeasuresLayers`."""
        return [shard.detach() for shard in self._shards.values()]

    def layer_squares(self, divisor: Tensor) -> Tensor:
        """See `MeasuresLayers`."""
        gradients = [shard.grad for shard in self._shards.values() if shard.grad is not None]
        assert len(gradients) == len(self._shards), "a parameter that the loss does not depend on"
        of_weights = self._layers.of(self.weights())
        return torch.stack([self._layers.of(gradients) / divisor.square(), of_weights])

    def apply(self, decision: UpdateDecision) -> None:
        """See `Engine`."""
        apply(self.optimizer, decision.skip, decision.factor)

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine`. What divides evenly shares memory with model and optimizer; the rest is
        gathered and copied."""
        found: dict[str, Tensor] = {}
        for name, shard in self._shards.items():
            found[MODEL + name] = self._rows(name, shard)
            for key, value in self.optimizer.state[shard].items():
                found[f"{OPTIMIZER}{name}.{key}"] = self._rows(name, value) if value.ndim else value
        return found

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for name, shard in self._shards.items():
            self._fill(name, shard, tensors[MODEL + name])
            for key, value in self.optimizer.state[shard].items():
                stored = tensors[f"{OPTIMIZER}{name}.{key}"]
                if value.ndim:
                    self._fill(name, value, stored)
                else:
                    value.copy_(stored)
        # After a forward pass without gradients the root keeps its gathered weights, which are old
        # ones now.
        for module in get_fsdp_instances(self.model):
            if module.has_full_params:
                module._free_full_params()

    def _initialise(self, config: ModelConfig, seed: int, progress: Progress | None) -> None:
        for done, (name, shard) in enumerate(self._shards.items()):
            if progress is not None:
                progress(done, len(self._shards))
            rows = self._rows(name, shard)
            initialise(_module_with(name, rows), config, seed)
            with torch.no_grad():
                self._fill(name, shard, rows)

    def _rows(self, name: str, shard: Tensor) -> DTensor:
        """This rank's rows of the parameter `name`, or of a moment of it, from all ranks' shards of
        it."""
        shape, world = self._shapes[name], self._mesh.size()
        if shape[0] % world == 0:  # a flat piece is whole rows, the same ones
            rows = shard.detach().view(shape[0] // world, *shape[1:])
            return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False)
        flat = shard.new_empty(world * shard.numel())
        dist.all_gather(list(flat.chunk(world)), shard.detach())
        return own_rows(flat[: shape.numel()].view(shape), self._mesh)

    def _fill(self, name: str, shard: Tensor, rows: Tensor) -> None:
        """The inverse of `_rows`."""
        assert isinstance(rows, DTensor)
        if self._shapes[name][0] % self._mesh.size() == 0:
            shard.view(-1).copy_(rows.to_local().view(-1))
            return
        own = whole_of(rows).view(-1)[self._mesh.get_local_rank() * shard.numel() :][
            : shard.numel()
        ]
        shard[: own.numel()].copy_(own)


def _shard(model: OPT, spec: EngineSpec) -> FullyShardedDataParallel:
    """`model`, which is on the meta device, as it trains: recomputing, compiled, sharded, in this
    order; no values."""
    precision, parallel, device = spec.precision, spec.parallel, spec.device
    mixed = precision.compute != precision.weights
    options: dict[str, Any] = {
        "process_group": dist.group.WORLD,
        "process_group_reduce_scatter": _another_world(device),
        "flatten_parameters": False,  # matrices decay and vectors do not
        "mixed_precision": mixed,
        "fp32_reduce_scatter": mixed,
        "compute_dtype": TYPES[precision.compute],
        "compute_device": device,
    }
    decoder = model.model.decoder
    for number, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        block.to_empty(device=device)
        recompute_and_compile(block, parallel.activation_checkpointing, parallel.compile)
        decoder.layers[number] = FullyShardedDataParallel(block, **options)
    for child in decoder.children():
        if child is not decoder.layers:
            child.to_empty(device=device)
    root = FullyShardedDataParallel(model, **options)
    # Sums, where fairscale gives averages.
    root.set_gradient_divide_factors(1.0, 1.0, recursive=True)
    root.register_forward_pre_hook(_out_of_reach)
    return root


def _another_world(device: torch.device) -> dist.ProcessGroup:
    """A group of all ranks beside the default one, so that sums overlap with gathers; it waits no
    longer than that."""
    world = dist.group.WORLD
    assert world is not None
    group = dist.new_group(timeout=world._get_backend(device).options._timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _out_of_reach(_: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A root in mixed precision casts what comes in fp32 to fp16, where the scale of gradients
    would not fit."""
    return tuple(
        tensor.double() if tensor is not None and tensor.dtype == torch.float32 else tensor
        for tensor in inputs
    )


def _module_with(name: str, rows: Tensor) -> nn.Module:
    """A module that has nothing but this parameter, under its whole name."""
    *path, last = name.split(".")
    module = outermost = nn.Module()
    for part in path:
        inner = nn.Module()
        module.add_module(part, inner)
        module = inner
    module.register_parameter(last, nn.Parameter(rows))
    return outermost
