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
from opt_train.model.decoder import OPT, Block
from opt_train.model.init import initialise
from opt_train.optim.adamw import apply, make_optimizer
from opt_train.optim.apex import choose, fuse_layer_norms
from opt_train.optim.clip import GradNorm, UpdateDecision, copies_of, global_norm, local_part
from opt_train.optim.per_layer_norms import LayerSquares
from opt_train.parallel.config import PrecisionConfig
from opt_train.parallel.engine import EngineSpec, Sums, loss_of
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


def build(spec: EngineSpec) -> OPT:
    """The model as it trains, with initial weights. Needs a process group.

    A rank never holds more than its shards and some rows. Gradients arrive as *sums* over ranks in
    fp32: the caller divides by the world's number of tokens, so that ranks may hold unequal numbers
    of them.

    Raises:
        BadInput: `spec.fused` asks for what is not there.
    """
    model = construct(spec)
    model.to_empty(device=spec.device)
    if spec.seed is not None:
        initialise(model, spec.model, spec.seed, spec.progress)
    return model


def construct(spec: EngineSpec) -> OPT:
    """The model on the meta device: split over tensor groups, recomputing, compiled, sharded, in
    this order.

    The order is torch's: tensor parallelism plans plain modules, what is recomputed wraps what is
    compiled (`opt_train.parallel.recompute`), and FSDP's hooks stay outside of both.
    """
    parallel, layout = spec.parallel, spec.layout
    with torch.device("meta"):
        model = OPT(spec.model).to(TYPES[spec.precision.weights])
    apex = choose(spec.fused, spec.device)
    if apex is not None and layout.tensor == 1 and not parallel.compile:
        fuse_layer_norms(model, apex)
    mesh = make_mesh(layout, spec.device)
    if layout.tensor > 1:
        split_over(model, mesh["tensor"])
    for block in model.model.decoder.layers:
        assert isinstance(block, Block)
        recompute_and_compile(block, parallel.activation_checkpointing, parallel.compile)
        is_eager_in_one_piece = layout.tensor == 1 and not parallel.compile
        if is_eager_in_one_piece and parallel.activation_checkpointing != "full":
            forget_outputs(block)
    if layout.gathers(spec.precision):
        _shard(model, spec.precision, mesh[layout.data_mesh])
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
        # On one rank torch would really divide by it, into another tensor.
        if mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
        # gloo knows no pre-multiplied sum; a plain sum is what is wanted anyway.
        module.set_force_sum_reduction_for_comms(True)


class Fsdp2:
    """`Engine` with torch's own sharding, replicas (HSDP), tensor and sequence parallelism;
    `MeasuresLayers` too."""

    def __init__(self, model: OPT, spec: EngineSpec) -> None:
        """Train `model`, which `build` has made of `spec`.

        Raises:
            BadInput: `spec.fused` asks for what is not there.
        """
        self.model = model
        self.optimizer = make_optimizer(model, spec.values, spec.fused)
        self._device = spec.device
        self._accumulate = spec.parallel.accumulate
        named = dict(model.named_parameters())
        copies = [copies_of(parameter) for parameter in named.values()]
        self._layers = LayerSquares(list(named), copies, spec.model.layers, spec.device)

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
        # A single rank's are sums already.
        if not isinstance(self.model, FSDPModule):
            return
        self.model.set_requires_gradient_sync(last or self._accumulate == "shards")
        # Replicas add up their own shards until the last micro-batch.
        self.model.set_requires_all_reduce(last)

    def embedding_gradients(self) -> list[Tensor]:
        """See `Engine`."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        found = (gradients[number] for number in self._layers.embedding)
        return [local_part(gradient) for gradient in found if gradient is not None]

    def grad_norm(
        self, tokens: Tensor, grad_scale: Tensor | None = None, loss_sum: Tensor | None = None
    ) -> GradNorm:
        """See `Engine`."""
        gradients = [
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        ]
        parts = [local_part(gradient) for gradient in gradients]
        return global_norm(
            parts,
            [copies_of(gradient) for gradient in gradients],
            tokens,
            grad_scale,
            loss_sum,
            self._layers.embedding,
        )

    def weights(self) -> list[Tensor]:
        """See `MeasuresLayers`."""
        return [local_part(parameter.detach()) for parameter in self.model.parameters()]

    def layer_squares(self, divisor: Tensor) -> Tensor:
        """See `MeasuresLayers`."""
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters), "a parameter that the loss does not depend on"
        of_gradients = self._layers.of([local_part(gradient) for gradient in gradients])
        of_weights = self._layers.of(self.weights())
        return torch.stack([of_gradients / divisor.square(), of_weights])

    def apply(self, decision: UpdateDecision) -> None:
        """See `Engine`."""
        apply(self.optimizer, decision.skip, decision.factor)

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine`; they share memory with the model and the optimizer."""
        return tensors_of(self.model, self.optimizer)

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        put_back(self.model, self.optimizer, tensors)
