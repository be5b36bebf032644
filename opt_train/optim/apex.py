"""NVIDIA's apex, where it is installed: its FusedAdam under our contract, and its FusedLayerNorm.
On GPUs alone.

PyPI's `apex` is another package, so what counts is FusedAdam and FusedLayerNorm themselves, never
that `import apex` works. Written after NVIDIA/apex `apex/optimizers/fused_adam.py`,
`csrc/multi_tensor_adam.cu` and `csrc/multi_tensor_apply.cuh`; docs/decisions/apex.md says what was
and was not tried.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opt_train.optim.clip import local_part
from opt_train.optim.memory_efficient import MOMENTS
from opt_train.protocol.exits import BadInput

EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
"""The compiled modules of the two; apex installs without them too."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Apex:
    """What is used of NVIDIA's apex."""

    fused_adam: Callable[..., Optimizer]
    fused_layer_norm: Callable[..., nn.Module]


@dataclass(frozen=True, slots=True)
class NoApex:
    """Why there is none."""

    why: str
    """A clause for a sentence."""
    is_surprising: bool
    """Something is installed that looks like it and cannot be used."""


def choose(wanted: str, device: torch.device) -> Apex | None:
    """Apex, or None for torch's own, as ``optim.fused`` = `wanted` means on `device`.

    Raises:
        BadInput: ``apex`` is wanted and cannot be had.
    """
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise BadInput(
            f"optim.fused=apex works on a GPU alone, and this is a {device.type}; use "
            "optim.fused=auto"
        )
    found = find()
    if isinstance(found, Apex):
        return found
    if wanted == "apex":
        raise BadInput(
            f"optim.fused=apex, but {found.why}; build NVIDIA's from github.com/NVIDIA/apex with "
            "its CUDA extensions "
            "(PyPI's apex is another package), or use optim.fused=auto"
        )
    if found.is_surprising:
        _warn_once(f"apex is not used, but torch's fused AdamW and LayerNorm: {found.why}")
    return None


@functools.cache
def find() -> Apex | NoApex:
    """NVIDIA's apex with its compiled extensions, or why there is none."""
    package = importlib.util.find_spec("apex")
    if package is None:
        return NoApex("NVIDIA's apex is not installed", is_surprising=False)
    # Looked for beside `apex` and not through it: a stranger's package is not even imported.
    folders = package.submodule_search_locations or []
    if importlib.machinery.PathFinder.find_spec("apex.optimizers", folders) is None:
        return NoApex(
            "the installed apex is not NVIDIA's but another package of that name",
            is_surprising=True,
        )
    if missing := [name for name in EXTENSIONS if importlib.util.find_spec(name) is None]:
        return NoApex(
            f"the installed apex was built without {' and '.join(missing)}", is_surprising=True
        )
    try:
        return Apex(
            importlib.import_module("apex.optimizers").FusedAdam,
            importlib.import_module("apex.normalization").FusedLayerNorm,
        )
    except (
        Exception
    ) as error:  # an extension built for another torch or CUDA fails in ways of its own
        return NoApex(
            f"the installed apex cannot be imported ({type(error).__name__}: {error})",
            is_surprising=True,
        )


@functools.cache
def _warn_once(sentence: str) -> None:
    log.warning(sentence)


# LayerNorm ----------------------------------------------------------------------------------------


def fuse_layer_norms(model: nn.Module, apex: Apex) -> None:
    """Let apex compute every LayerNorm of `model`: the same parameters under the same names, in
    another module.

    For a model whose parameters are plain tensors and whose blocks are not compiled: apex's kernels
    take no DTensors, and a compiler makes its own.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.LayerNorm:
                with torch.device("meta"):  # parameters of its own, that nobody will see
                    fused = apex.fused_layer_norm(
                        child.normalized_shape, eps=child.eps, elementwise_affine=True
                    )
                fused.weight, fused.bias = child.weight, child.bias
                setattr(module, name, fused.train(child.training))


# AdamW --------------------------------------------------------------------------------------------


class ApexAdamW(Optimizer):
    """FusedAdam over this rank's parts of the parameters, all fp32, with the state that torch's
    AdamW has.

    FusedAdam lives inside and is handed its lists at each step: its kernels know no DTensor, and an
    empty part at a list's end would keep them from being launched. It is made `capturable`, its
    name for a step that the host does not wait for, and gets the decision where it looks for a
    gradient scaler's. The state must be given (`make_optimizer`).
    """

    gradient_factor: Tensor | None = None
    """fp32 scalar on the device that gradients are multiplied by, in the kernel; None: 1."""
    found_inf: Tensor | None = None
    """fp32 scalar on the device: where it is 1, `step` changes nothing, to the bit; None: 0."""

    def __init__(self, params: Iterable[Any], apex: Apex, lr: float = 1e-3) -> None:
        super().__init__(
            params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        )
        groups = [(group, _not_empty(group)) for group in self.param_groups]
        self._groups = [group for group, parameters in groups if parameters]
        """Those that this rank holds anything of; FusedAdam's are in the same order."""
        lists = [
            {"params": [_own_part(p) for p in parameters]} for _, parameters in groups if parameters
        ]
        self._fused: Any = (
            apex.fused_adam(lists, lr=lr, adam_w_mode=True, capturable=True) if lists else None
        )

    @torch.no_grad()
    # Torch's overloads.
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter; each must have a gradient. Nothing waits for the
        device."""
        assert closure is None, "gradients are computed outside"
        steps = [state["step"] for state in self.state.values()]
        skip = torch.zeros_like(steps[0]) if self.found_inf is None else self.found_inf
        if self._fused is not None:
            # FusedAdam counts its steps by this buffer before it looks at the decision, so would go
            # by the last step's, and in its second group by this one's.
            self._fused._dummy_overflow_buf.copy_(skip)
            self._fused.state.clear()
            for group, fused in zip(self._groups, self._fused.param_groups, strict=True):
                self._hand_over(group, fused)
            self._fused.step(grad_scaler=_ScalerAnswers(skip, self.gradient_factor))
            for fused in self._fused.param_groups:
                for own in fused["params"]:
                    own.grad = None  # it would stay allocated until the next step
        # As a list: one scalar tensor would be read by the host.
        torch._foreach_add_(steps, [(skip == 0).float()] * len(steps))

    def _hand_over(self, group: dict[str, Any], fused: dict[str, Any]) -> None:
        """Memory to work on, and what is in force; new tensors are made on the device."""
        parameters = _not_empty(group)
        fused["params"] = [_own_part(parameter) for parameter in parameters]
        for parameter, own in zip(parameters, fused["params"], strict=True):
            own.grad = _own_part(parameter.grad)
            self._fused.state[own] = {
                name: _own_part(self.state[parameter][name]) for name in MOMENTS
            }
        done = self.state[parameters[0]]["step"]
        fused["step"] = done.to(torch.int32).reshape(1)
        fused["lr"] = torch.full_like(done, group["lr"])
        fused.update({name: group[name] for name in ("betas", "eps", "weight_decay")})


class _ScalerAnswers:
    """Answers what FusedAdam asks a `torch.amp.GradScaler`."""

    def __init__(self, skip: Tensor, factor: Tensor | None) -> None:
        self._skip = skip
        self._factor = torch.ones_like(skip) if factor is None else factor

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        return {self._skip.device: self._skip}

    def _get_scale_async(self) -> Tensor:
        # FusedAdam takes the reciprocal back, in double precision too: what that rounds to in fp32
        # is the factor.
        return self._factor.double().reciprocal()


def _not_empty(group: dict[str, Any]) -> list[Tensor]:
    """The parameters that this rank holds elements of."""
    return [parameter for parameter in group["params"] if local_part(parameter).numel()]


def _own_part(tensor: Tensor | None) -> Tensor:
    """What this rank holds of `tensor`, in the same memory, outside of autograd."""
    assert tensor is not None, "a parameter without a gradient"
    return local_part(tensor).detach()
