"""The one place that turns model and optimizer into named tensors, and back. Saving and restoring
both use it.

Names are the model's own (wrappers of compilation and activation checkpointing taken off):
`model.<parameter>` and `optimizer.<parameter>.<state>`. What the optimizer is *told* (learning
rate, betas, decay) is not in here: a checkpoint must not overrule a configuration changed since, as
happened to OPT-175B's runs 12.35-12.37.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from opt_train.checkpoint.manifest import CheckpointError

MODEL = "model."
OPTIMIZER = "optimizer."

_STATE = "state."
_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
"""What torch.compile and activation checkpointing put into a parameter's path, and torch's state
dicts leave out."""
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Restorable(Protocol):
    """Whose state is named tensors: an engine, or `ModelAndOptimizer`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of the state by the names of a checkpoint; what a restore writes into."""
        ...

    def put_back(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make `tensors`, named and shaped as `tensors()` has them, the state."""
        ...


@dataclass(frozen=True, slots=True)
class ModelAndOptimizer:
    """A model that torch alone spreads, or nothing, and its optimizer; None: the weights alone, as
    evaluation needs."""

    model: nn.Module
    optimizer: Optimizer | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `tensors_of`."""
        return tensors_of(self.model, self.optimizer)

    def put_back(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `put_back`."""
        put_back(self.model, self.optimizer, tensors)


@dataclass(frozen=True, slots=True)
class WeightsAlone:
    """The weights of something that has more state, which stays as it is."""

    of: Restorable

    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's tensors."""
        return {
            name: tensor for name, tensor in self.of.tensors().items() if name.startswith(MODEL)
        }

    def put_back(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make `tensors` the weights."""
        self.of.put_back({**self.of.tensors(), **tensors})


def tensors_of(model: nn.Module, optimizer: Optimizer | None) -> dict[str, torch.Tensor]:
    """Every tensor of training's state by name, sharing memory with the model and the optimizer.

    A parameter that the model uses in two places is in here once. An optimizer that has not stepped
    gets its state first, all zeros. Numbers in the optimizer's state become 0-dimensional int64 or
    float64 tensors.

    Raises:
        CheckpointError: the optimizer holds something that is neither tensor nor number.
    """
    reshard(model)
    return {name: _as_tensor(name, value) for name, value in _values_of(model, optimizer).items()}


def put_back(
    model: nn.Module, optimizer: Optimizer | None, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Make `tensors`, named and shaped as `tensors_of` has them, the state of model and
    optimizer."""
    reshard(model)
    values = get_model_state_dict(model)
    owners = _owners(model)
    set_model_state_dict(model, {name: tensors[MODEL + owners.get(name, name)] for name in values})
    if optimizer is None:
        return
    materialise(optimizer)
    state: dict[str, Any] = {}
    for name, value in get_optimizer_state_dict(model, optimizer, options=_FLAT).items():
        if not name.startswith(_STATE):
            state[name] = value
            continue
        tensor = tensors[OPTIMIZER + name.removeprefix(_STATE)]
        state[name] = tensor if isinstance(value, torch.Tensor) else tensor.item()
    set_optimizer_state_dict(model, optimizer, state, options=_FLAT)


def reshard(model: nn.Module) -> None:
    """Bring every FSDP module back to its shards.

    After a forward pass without gradients the root stays unsharded: its parameters are then plain
    tensors, and what is written to them is lost at the next gather.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def materialise(optimizer: Optimizer) -> None:
    """Give an optimizer that has not stepped yet its state tensors, as they are before the first
    step.

    The state comes from a real step with zero gradients and zero learning rate, which moves no
    weight, so that every tensor has the shape, type, device and placement that the optimizer itself
    gives it.
    """
    if optimizer.state:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        # That step does not count: Adam's bias correction goes by updates that were applied.
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0


def _values_of(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    values = get_model_state_dict(model)
    owners = _owners(model)
    named = {
        MODEL + name: value for name, value in values.items() if owners.get(name, name) == name
    }
    if optimizer is None:
        return named
    materialise(optimizer)
    try:
        state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    except NotImplementedError as error:
        raise CheckpointError(f"the optimizer's state cannot be saved: {error}") from None
    return named | {
        OPTIMIZER + name.removeprefix(_STATE): value
        for name, value in state.items()
        if name.startswith(_STATE)
    }


def _owners(model: nn.Module) -> dict[str, str]:
    """For each parameter's name the first name of the same parameter: itself, unless the model uses
    it twice.

    By identity and not by memory: a rank whose shard is empty has no memory to compare, and all
    ranks must agree.
    """
    first: dict[int, str] = {}
    owners = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = ".".join(part for part in raw.split(".") if part not in _WRAPPERS)
        owners[name] = first.setdefault(id(parameter), name)
    return owners


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{name} is a {type(value).__name__}, neither tensor nor number: it cannot be saved"
        )
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
