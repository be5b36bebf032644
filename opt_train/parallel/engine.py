"""What spreads a model over ranks and trains it there: engines behind one protocol, chosen by
`parallel.engine`.

An engine computes gradients and moves weights. Batches, loss scale, clipping, the decision to skip
and the LR are the trainer's, the same for every engine, and are decided on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import Loss
from opt_train.model.init import Progress
from opt_train.optim.clip import GradNorm, UpdateDecision
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.layout import Layout


class Sums(NamedTuple):
    """A rank's sums over the tokens of its micro-batches; scalars on the device, detached."""

    loss_sum: Tensor
    """Nats, fp32."""
    activation_squares: Tensor
    """Of the last layer's output, fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """All that an engine is built from."""

    model: ModelConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    layout: Layout
    device: torch.device
    values: Mapping[str, float]
    """What is in force (`opt_train.optim.in_force`)."""
    seed: int | None
    """Of the initial weights; None: they hold anything, for somebody who fills every one from a
    checkpoint."""
    progress: Progress | None = None
    """Called with how many parameters of how many have their initial weights."""
    fused: str = "torch"
    """`OptimConfig.fused`, which means LayerNorms too; the optional engines have torch's."""


class Engine(Protocol):
    """One rank's part of the model and its optimizer. Every rank calls the same methods in the same
    order."""

    @property
    def model(self) -> nn.Module:
        """Called as `OPT.forward` is, it gives sums of the loss; for a validation, without
        gradients."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """Its groups get LR, betas, eps and decay before each step
        (`opt_train.optim.adamw.put_in_force`)."""
        ...

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], grad_scale: Tensor | None = None
    ) -> Sums:
        """Compute the gradients, *summed* over tokens and ranks.

        Args:
            grad_scale: fp32 scalar on the device that the gradients are multiplied by; None: 1.
        """
        ...

    def embedding_gradients(self) -> list[Tensor]:
        """This rank's parts of the gradient of the embedding (tokens, with the head that is tied to
        them, positions, and a projection behind them), maybe empty; whoever multiplies them in
        place before `grad_norm` has another gradient."""
        ...

    def grad_norm(
        self, tokens: Tensor, grad_scale: Tensor | None = None, loss_sum: Tensor | None = None
    ) -> GradNorm:
        """The norm of what `forward_backward` computed, over the world
        (`opt_train.optim.clip.global_norm`)."""
        ...

    def apply(self, decision: UpdateDecision) -> None:
        """Move the weights, or leave everything as it was, to the bit; then forget the
        gradients."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by the names of a checkpoint, the same with every engine."""
        ...

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Make `tensors`, named and shaped as `tensors()` has them, the state."""
        ...


@runtime_checkable
class MeasuresLayers(Protocol):
    """What an `Engine` may offer beside the rest. Of one that does not, the metrics have no norms
    of layers and no update ratio."""

    def weights(self) -> list[Tensor]:
        """This rank's part of each weight that is updated, maybe empty; it shares their memory and
        is read alone."""
        ...

    def layer_squares(self, divisor: Tensor) -> Tensor:
        """This rank's shares of the layers' squared L2 norms, of the averaged gradient and of the
        weights.

        Asked for between `grad_norm` and `apply`; communicates nothing, and does not wait for the
        device.

        Args:
            divisor: `GradNorm.divisor`.

        Returns:
            fp64, [2, layers + 2] (`opt_train.optim.per_layer_norms.LayerSquares`); the world's sum
            is the square.
        """
        ...


def loss_of(
    model: nn.Module, batch: MicroBatch, device: torch.device, grad_scale: Tensor | None = None
) -> Loss:
    """`model`'s sums over one micro-batch, differentiable where gradients are on."""
    # Ids and weights keep their types: engines in mixed precision must not cast them.
    tokens, targets, weights = (
        _sent(tensor, device) for tensor in (batch.tokens, batch.targets, batch.weights)
    )
    loss = model(tokens, targets, weights, grad_scale)
    assert isinstance(loss, Loss)
    return loss


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    # From memory that is not pinned the copy may begin by waiting for all that the device has been
    # given to do (CUDA's "API synchronization behavior"): micro-batches would not be queued one
    # behind the other.
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
