"""What is kept of a block's forward pass and what is computed again: activation checkpointing, and
compilation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opt_train.model.decoder import Block


def recompute_and_compile(block: Block, recompute: str, compiled: bool) -> None:
    """Keep less of `block`'s forward pass, and compile it.

    ``full`` keeps the block's input alone and costs a second forward pass (Chen et al. 2016, arXiv
    1604.06174). ``selective`` computes attention again, whose activations are large and whose
    arithmetic is small (Korthikanti et al. 2022, arXiv 2205.05198, section 5). Compilation happens
    at the first step, once for all blocks.

    Forward methods are replaced, not modules: parameters keep their names, and FSDP's hooks stay
    outside. What is compiled lies inside what is recomputed: torch 2.13 cannot save DTensors the
    other way round.
    """
    if recompute == "selective":
        attention = block.self_attn
        # Hidden from the compiler, which would look through it: the block's graph breaks here.
        inner = torch.compile(attention.forward, fullgraph=True) if compiled else attention.forward
        disable: Any = torch.compiler.disable  # torch does not type it
        again = disable(partial(_recomputed, inner), recursive=False)
        _replace_forward(attention, again)
    if compiled:
        _replace_forward(block, torch.compile(block.forward, fullgraph=recompute != "selective"))
    if recompute == "full":
        _replace_forward(block, partial(_recomputed, block.forward))


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward
