"""The model spread over ranks with FSDP2 (`fully_shard`), gradients summed and never averaged."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.model.init import Progress, initialise
from opt_train.parallel.config import PrecisionConfig
from opt_train.parallel.layout import Layout
from opt_train.protocol.exits import BadInput

COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The mesh of data-parallel ranks: one-dimensional, or replicate x shard for HSDP. Needs a process group.

    Raises:
        BadInput: the layout asks for tensor parallelism, which this trainer does not do.
    """
    if layout.tensor != 1:
        raise BadInput(
            f"parallel.tensor={layout.tensor}: this version shards data-parallel only; use parallel.tensor=1."
        )
    if layout.replicate == 1:
        return init_device_mesh(device.type, (layout.shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard"))


def build(
    config: ModelConfig,
    precision: PrecisionConfig,
    mesh: DeviceMesh,
    device: torch.device,
    seed: int | None,
    progress: Progress | None = None,
) -> OPT:
    """The model with initial weights, each block and then the root sharded over `mesh`.

    It is made on the meta device, so a rank never holds more than its shards and one whole parameter. Gradients arrive
    as *sums* over ranks in fp32: the caller divides by the world's number of tokens, so that ranks may hold unequal
    numbers of them.

    Args:
        seed: of the initial weights; None: they hold anything, for somebody who fills every one from a checkpoint.
        progress: told how many parameters of how many have their initial weights.

    Raises:
        BadInput: `precision.compute` is not known.
    """
    if precision.compute not in COMPUTE_TYPES:
        raise BadInput(f"precision.compute={precision.compute!r} must be one of {', '.join(COMPUTE_TYPES)}.")
    with torch.device("meta"):
        model = OPT(config)
    # Inputs keep their types: the embeddings come out in the compute type, and tokens' weights stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE_TYPES[precision.compute], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.model.decoder.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in (model, *model.model.decoder.layers):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        # gloo knows no pre-multiplied sum; a plain sum is what is wanted anyway.
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    if seed is not None:
        initialise(model, config, seed, progress)
    return model


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients or (all micro-batches but the last) only adds them up locally."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(now)
