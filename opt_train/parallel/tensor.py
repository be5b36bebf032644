"""Tensor parallelism with sequence parallelism: which part of each layer a rank computes
(Megatron-LM).

Attention is split by heads and the feed-forward network by its width (arXiv 1909.08053, section 3);
between them, and in LayerNorms, dropout and residuals, each rank has a part of the sequence (arXiv
2205.05198, section 4.2.2). The embedding is split by vocabulary, and with it the tied head and its
loss (`opt_train.model.loss`).
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from opt_train.model.decoder import OPT, Block

SEQUENCE = 1
"""The dimension of [batch, sequence, d_model] that is split between the layers."""


def split_over(model: OPT, mesh: DeviceMesh) -> None:
    """Turn every parameter of `model` into a DTensor over the one-dimensional `mesh`, and let the
    modules communicate.

    All of them: what clips gradients needs each parameter on one mesh.
    """
    # A parameter that is left out of the plan lies on another mesh, and torch's clipping breaks;
    # `SequenceParallel` puts LayerNorms, which are not split, on it too.
    split, whole = Shard(SEQUENCE), Replicate()
    parts: dict[str, ParallelStyle] = {
        "embed_tokens": _VocabularyParallel(),
        "embed_positions": _PositionParallel(),
        "project_in": ColwiseParallel(input_layouts=split, output_layouts=split),
        "project_out": ColwiseParallel(input_layouts=split, output_layouts=split),
        "final_layer_norm": SequenceParallel(use_local_output=True),
    }
    parallelize_module(
        model.model.decoder, mesh, {name: parts[name] for name in parts if _has(model, name)}
    )
    for block in model.model.decoder.layers:
        parallelize_module(
            block,
            mesh,
            {
                "self_attn_layer_norm": SequenceParallel(use_local_output=True),
                "self_attn": PrepareModuleInput(
                    input_layouts=(split,), desired_input_layouts=(whole,)
                ),
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.out_proj": RowwiseParallel(output_layouts=split),
                "final_layer_norm": SequenceParallel(use_local_output=True),
                "fc1": ColwiseParallel(input_layouts=split),
                "fc2": RowwiseParallel(output_layouts=split),
            },
        )
        # Each rank computes its own heads.
        assert isinstance(block, Block)
        block.self_attn.heads //= mesh.size()


def _has(model: OPT, name: str) -> bool:
    return getattr(model.model.decoder, name, None) is not None


class _VocabularyParallel(ParallelStyle):
    """Every rank looks up the tokens whose rows it has; the sum of all is left in parts of the
    sequence.

    torch's own style would make the gradient of the whole table on each rank.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        rows = distribute_tensor(module.weight, device_mesh, [Shard(0)], src_data_rank=None)
        module.weight = nn.Parameter(rows)
        module.forward = partial(_look_up, module)  # type: ignore[method-assign]
        return module


def _look_up(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """Ids [batch, sequence] -> this rank's part of the sequence, [batch, sequence / ranks,
    width]."""
    weight = module.weight
    assert isinstance(weight, DTensor)
    mesh, rows = weight.device_mesh, weight.to_local()
    own = tokens - mesh.get_local_rank() * rows.shape[0]
    elsewhere = (own < 0) | (own >= rows.shape[0])
    found = F.embedding(own.masked_fill(elsewhere, 0), rows).masked_fill(elsewhere[..., None], 0.0)
    return (
        DTensor.from_local(found, mesh, [Partial()])
        .redistribute(placements=[Shard(SEQUENCE)])
        .to_local()
    )


class _PositionParallel(ParallelStyle):
    """Every rank has the whole table (its 2050 rows divide by nothing) and looks up its part of the
    sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # torch's hints promise that hooks return nothing; its code takes what they return.
        parts: Any = (_replicate, _own_positions, _local)
        return distribute_module(module, device_mesh, *parts)


def _replicate(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(spread))


def _own_positions(_module: nn.Module, inputs: Any, mesh: DeviceMesh) -> tuple[DTensor]:
    (positions,) = inputs
    return (
        DTensor.from_local(positions, mesh, [Replicate()], run_check=False).redistribute(
            placements=[Shard(0)]
        ),
    )


def _local(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Tensor:
    assert isinstance(output, DTensor)
    return output.to_local()
