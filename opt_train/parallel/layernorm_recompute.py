"""LayerNorms whose outputs are not kept for the backward pass but computed again: cheap to compute,
large to keep."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from opt_train.model.decoder import Block

Forward = Callable[[Tensor], Tensor]


def forget_outputs(block: Block) -> None:
    """Let what comes out of `block`'s LayerNorms live no longer than its forward pass.

    The products behind a LayerNorm would keep its output until their backward pass, beside its
    input, which the LayerNorm keeps. Computed again from that input it is the same to the bit. For
    an eager block in one piece: tensor parallelism gathers what the products keep, and a compiler
    decides such things itself.
    """
    forgetting = _Forgetting(block.forward)
    # Forward methods are replaced, not modules: parameters keep their names, and FSDP's hooks stay
    # outside.
    block.forward = forgetting.forward  # type: ignore[assignment, method-assign]
    for layer_norm in (block.self_attn_layer_norm, block.final_layer_norm):
        forward = partial(forgetting.norm, layer_norm.forward)
        layer_norm.forward = forward  # type: ignore[method-assign]


class _Forgetting:
    """One block's forward pass, which hands autograd a way to have LayerNorms' outputs again
    instead of them."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._outputs: dict[int, tuple[Tensor, _Again]] = {}
        """Of the forward pass under way, by their storages; none is freed meanwhile, to make room
        for another at its place."""

    def forward(self, hidden: Tensor, *others: object) -> Tensor:
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return self._forward(hidden, *others)
        finally:
            self._outputs.clear()

    def norm(self, forward: Forward, hidden: Tensor) -> Tensor:
        output = forward(hidden)
        self._outputs[output.untyped_storage()._cdata] = output, _Again(forward, hidden.detach())
        return output

    def _pack(self, tensor: Tensor) -> "Tensor | tuple[_Again, torch.Size]":
        found = self._outputs.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        output, again = found
        if (
            tensor.numel() != output.numel() or not tensor.is_contiguous()
        ):  # another view than the products'
            return tensor
        again.wanted += 1
        return again, tensor.shape


def _unpack(packed: "Tensor | tuple[_Again, torch.Size]") -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, shape = packed
    return again.output().view(shape)


class _Again:
    """A LayerNorm's output, computed when the first one wants it and kept until the last one has
    had it."""

    def __init__(self, forward: Forward, hidden: Tensor) -> None:
        self.wanted = 0
        self._forward = forward
        self._hidden = hidden
        self._output: Tensor | None = None

    def output(self) -> Tensor:
        output = self._output
        if output is None:
            with torch.no_grad():
                output = self._forward(self._hidden)
        self.wanted -= 1
        self._output = output if self.wanted > 0 else None
        return output
