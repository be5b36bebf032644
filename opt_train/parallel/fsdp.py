"""The model spread over ranks with FSDP2 (`fully_shard`), gradients summed and never averaged."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Block
from opt_train.model.init import Progress, initialise
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.layout import Layout
from opt_train.parallel.recompute import recompute_and_compile
from opt_train.parallel.tensor import split_over

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The mesh of all ranks, with the names of `Layout.mesh`. Needs a process group."""
    return init_device_mesh(device.type, tuple(layout.mesh.values()), mesh_dim_names=tuple(layout.mesh))


def build(
    config: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    layout: Layout,
    device: torch.device,
    seed: int | None,
    progress: Progress | None = None,
) -> OPT:
    """The model as it trains, with initial weights. Needs a process group.

    A rank never holds more than its shards and some rows. Gradients arrive as *sums* over ranks in fp32: the caller
    divides by the world's number of tokens, so that ranks may hold unequal numbers of them.

    Args:
        seed: of the initial weights; None: they hold anything, for somebody who fills every one from a checkpoint.
        progress: told how many parameters of how many have their initial weights.
    """
    model = construct(config, precision, parallel, layout, device)
    model.to_empty(device=device)
    if seed is not None:
        initialise(model, config, seed, progress)
    return model


def construct(
    config: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, layout: Layout, device: torch.device
) -> OPT:
    """The model on the meta device: split over tensor groups, recomputing, compiled, sharded, in this order."""
    with torch.device("meta"):
        model = OPT(config).to(TYPES[precision.weights])
    mesh = make_mesh(layout, device)
    if layout.tensor > 1:
        split_over(model, mesh["tensor"])
    for block in model.model.decoder.layers:
        assert isinstance(block, Block)
        recompute_and_compile(block, parallel.activation_checkpointing, parallel.compile)
    _shard(model, precision, mesh[layout.data_mesh])
    return model


def _shard(model: OPT, precision: PrecisionConfig, mesh: DeviceMesh) -> None:
    # Inputs keep their types: the embeddings come out in the compute type, and tokens' weights stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=TYPES[precision.compute], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*model.model.decoder.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        # gloo knows no pre-multiplied sum; a plain sum is what is wanted anyway.
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients or (all micro-batches but the last) only adds them up locally."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(now)
