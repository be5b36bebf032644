"""The model spread over ranks with FSDP2 (`fully_shard`), gradients summed and never averaged. The
default engine."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from opt_train.checkpoint.tensors import put_back, tensors_of
from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Block
from opt_train.model.init import Progress, initialise
from opt_train.optim.adamw import apply, make_optimizer
from opt_train.optim.apex import choose, fuse_layer_norms
from opt_train.optim.clip import GradNorm, Verdict, copies_of, global_norm, local_part
from opt_train.optim.per_layer_norms import LayerSquares
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import Sums, loss_of
from opt_train.parallel.layernorm_recompute import forget_outputs
from opt_train.parallel.layout import Layout
from opt_train.parallel.recompute import recompute_and_compile
from opt_train.parallel.tensor import split_over

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The mesh of all ranks, with the names of `Layout.mesh`. Needs a process group, whose timeout
    its groups get."""
    mesh = init_device_mesh(
        device.type, tuple(layout.mesh.values()), mesh_dim_names=tuple(layout.mesh)
    )
    world = dist.group.WORLD
    assert world is not None
    # torch gives groups of parts of the world a timeout of its own, half an hour. A rehearsal's
    # have no options.
    if (options := world._get_backend(device).options) is not None:
        for group in mesh.get_all_groups():
            group._get_backend(device)._set_default_timeout(options._timeout)
    return mesh


def build(
    config: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    layout: Layout,
    device: torch.device,
    seed: int | None,
    progress: Progress | None = None,
    fused: str = "torch",
) -> OPT:
    """The model as it trains, with initial weights. Needs a process group.

    A rank never holds more than its shards and some rows. Gradients arrive as *sums* over ranks in
    fp32: the caller divides by the world's number of tokens, so that ranks may hold unequal numbers
    of them.

    Args:
        seed: of the initial weights; None: they hold anything, for somebody who fills every one
            from a checkpoint.
        progress: told how many parameters of how many have their initial weights.
        fused: `OptimConfig.fused`, which means LayerNorms too.

    Raises:
        BadInput: `fused` asks for what is not there.
    """
    model = construct(config, precision, parallel, layout, device, fused)
    model.to_empty(device=device)
    if seed is not None:
        initialise(model, config, seed, progress)
    return model


def construct(
    config: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    layout: Layout,
    device: torch.device,
    fused: str = "torch",
) -> OPT:
    """The model on the meta device: split over tensor groups, recomputing, compiled, sharded, in
    this order."""
    with torch.device("meta"):
        model = OPT(config).to(TYPES[precision.weights])
    apex = choose(fused, device)
    if apex is not None and layout.tensor == 1 and not parallel.compile:
        fuse_layer_norms(model, apex)
    mesh = make_mesh(layout, device)
    if layout.tensor > 1:
        split_over(model, mesh["tensor"])
    for block in model.model.decoder.layers:
        assert isinstance(block, Block)
        recompute_and_compile(block, parallel.activation_checkpointing, parallel.compile)
        if (
            layout.tensor == 1
            and not parallel.compile
            and parallel.activation_checkpointing != "full"
        ):
            forget_outputs(block)
    if layout.gathers(precision):
        _shard(model, precision, mesh[layout.data_mesh])
    return model


def _shard(model: OPT, precision: PrecisionConfig, mesh: DeviceMesh) -> None:
    # Inputs keep their types: the embeddings come out in the compute type, and tokens' weights stay
    # fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=TYPES[precision.compute], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*model.model.decoder.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        if mesh.size() > 1:  # alone torch would really divide by it, into another tensor
            module.set_gradient_divide_factor(1.0)
        # gloo knows no pre-multiplied sum; a plain sum is what is wanted anyway.
        module.set_force_sum_reduction_for_comms(True)


class Fsdp2:
    """`Engine` with torch's own sharding, replicas (HSDP), tensor and sequence parallelism;
    `MeasuresLayers` too."""

    def __init__(
        self,
        model: OPT,
        device: torch.device,
        values: Mapping[str, float],
        accumulate: str,
        fused: str = "torch",
    ) -> None:
        """Train `model`, made by `build`.

        Args:
            values: what is in force (`opt_train.optim.in_force`).
            accumulate: `ParallelConfig.accumulate`.
            fused: `OptimConfig.fused`.

        Raises:
            BadInput: `fused` asks for what is not there.
        """
        self.model = model
        self.optimizer = make_optimizer(model, values, fused)
        self._device = device
        self._accumulate = accumulate
        named = dict(model.named_parameters())
        copies = [copies_of(parameter) for parameter in named.values()]
        self._layers = LayerSquares(list(named), copies, model.config.layers, device)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], grad_scale: Tensor | None = None
    ) -> Sums:
        """See `Engine`."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        activation_squares = torch.zeros((), dtype=torch.float32, device=self._device)
        for number, batch in enumerate(micro_batches, start=1):
            self._reduce_gradients(last=number == len(micro_batches))
            loss = loss_of(self.model, batch, self._device, grad_scale)
            # torch's stubs leave backward untyped.
            loss.loss_sum.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.loss_sum.detach()
            activation_squares += loss.activation_squares
        return Sums(loss_sum, activation_squares)

    def _reduce_gradients(self, last: bool) -> None:
        """Whether the next backward sums gradients over ranks, or only adds them to what is
        there."""
        if not isinstance(self.model, FSDPModule):  # a lone rank's are sums already
            return
        self.model.set_requires_gradient_sync(last or self._accumulate == "shards")
        # Replicas add up their own shards until the last micro-batch.
        self.model.set_requires_all_reduce(last)

    def grad_norm(self, tokens: Tensor, grad_scale: Tensor | None = None) -> GradNorm:
        """See `Engine`."""
        gradients = [
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        ]
        parts = [local_part(gradient) for gradient in gradients]
        return global_norm(
            parts, [copies_of(gradient) for gradient in gradients], tokens, grad_scale
        )

    def layer_squares(self, divisor: Tensor) -> Tensor:
        """See `MeasuresLayers`."""
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters), "a parameter that the loss does not depend on"
        of_gradients = self._layers.of([local_part(gradient) for gradient in gradients])
        of_weights = self._layers.of([local_part(parameter.detach()) for parameter in parameters])
        return torch.stack([of_gradients / divisor.square(), of_weights])

    def apply(self, verdict: Verdict) -> None:
        """See `Engine`."""
        apply(self.optimizer, verdict.skip, verdict.factor)

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine`; they share memory with the model and the optimizer."""
        return tensors_of(self.model, self.optimizer)

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        put_back(self.model, self.optimizer, tensors)
