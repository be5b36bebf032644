"""DeepSpeed's optimizers around AdamW, one class each: where stages 1 to 3 keep weights, gradients
and moments.

DeepSpeed has three of them with nothing in common but the idea, and no interface for what an engine
needs beside `step`. What is private to them is touched here alone.
"""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Its logger, made as it loads, and some of its parts write to stdout.
with contextlib.redirect_stdout(sys.stderr):
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )


class Zero(Protocol):
    """What an engine needs of one of DeepSpeed's optimizers around AdamW."""

    averaged_over: int
    """What gradients come divided by."""

    def masters(self) -> list[Tensor]:
        """This rank's flat partitions of the fp32 weights, which are AdamW's parameters."""
        ...

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """This rank's part of each one's gradient, fp32, reduced over ranks, maybe empty; each
        element on one."""
        ...

    def weights(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """This rank's part of each one's fp32 weights, maybe empty."""
        ...

    def step(self) -> None:
        """AdamW on the partitions, then the compute copies; forgets the gradients."""
        ...

    def link_moments(self) -> None:
        """Let single parameters find their part of AdamW's flat state."""
        ...

    def set_whole(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Make this rank's part of `whole` that of the fp32 weights; with `key`, of a moment."""
        ...

    def refresh(self) -> None:
        """Make the compute copies, on all ranks, from the fp32 weights."""
        ...


class _Stage1And2:
    averaged_over = 1

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer

    def masters(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        owned_gradients: dict[nn.Parameter, Tensor] = {}
        for group, parameters_of_rank in enumerate(self._zero.params_in_partition):
            # Behind the parameters' there may be one more part, which pads the partition.
            owned_gradients.update(
                zip(parameters_of_rank, self._zero.averaged_gradients[group], strict=False)
            )
        return [
            owned_gradients.get(parameter, torch.empty(0, device=parameter.device))
            for parameter in parameters
        ]

    def weights(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        masters = self.masters()
        return [self._part_of(parameter, masters) for parameter in parameters]

    def _part_of(self, parameter: nn.Parameter, flat: list[Tensor]) -> Tensor:
        """What belongs to `parameter` of something flat like the partitions."""
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if mapping is None:
            return torch.empty(0, device=parameter.device)
        where = mapping.hp_fragment_address
        part: Tensor = flat[mapping.param_group_index].detach().narrow(0, where.start, where.numel)
        return part

    def step(self) -> None:
        self._engine.step()

    def link_moments(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()

    def set_whole(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        if key is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)

    def refresh(self) -> None:
        self._zero.update_lp_params()


class _Bf16Stage1(_Stage1And2):
    """With bf16, DeepSpeed's stage 1 is another class, which keeps all gradients in fp32 on every
    rank."""

    def masters(self) -> list[Tensor]:
        return list(self._zero.fp32_groups_flat_partition)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        flat = self._zero.fp32_groups_gradient_flat_partition
        return [self._part_of(parameter, flat) for parameter in parameters]

    def step(self) -> None:
        # What its own step does, without its norm of the whole gradient, which the host would wait
        # for.
        for master, gradient in zip(
            self.masters(), self._zero.fp32_groups_gradient_flat_partition, strict=True
        ):
            master.grad = gradient
        self._zero.optimizer.step()
        self._zero.update_lp_params()
        self._zero.clear_hp_grads()


class _Stage3:
    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        # Stage 3 divides gradients by this before it sums them, and knows no other way. The norm's
        # divisor is divided too, which is exact where the world is a power of two; elsewhere a
        # gradient is rounded once more.
        self.averaged_over = dist.get_world_size()
        # Its own norm: the host would wait for it, and leave out steps by a rule
        # of its own.
        self._zero._get_norm_groups = lambda: [torch.zeros(())]

    def masters(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        owned_gradients: dict[nn.Parameter, Tensor] = {}
        for number, parameters_of_rank in enumerate(self._zero.fp16_groups):
            owned_gradients.update(
                zip(parameters_of_rank, self._zero.averaged_gradients[number], strict=True)
            )
        return [owned_gradients[parameter] for parameter in parameters]

    def weights(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        return [safe_get_local_fp32_param(parameter).detach() for parameter in parameters]

    def step(self) -> None:
        self._engine.step()

    def link_moments(self) -> None:
        """They are found by their offsets."""

    def set_whole(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        # DeepSpeed's setter for whole tensors takes none that the world does not divide.
        size, rank = parameter.ds_tensor.numel(), dist.get_rank()  # type: ignore[attr-defined]
        padded = F.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
        own = padded[rank * size : (rank + 1) * size]
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)

    def refresh(self) -> None:
        # As at the end of its step, where parameters that are kept whole are gathered again.
        self._zero._partition_all_parameters()
        for number in range(len(self.masters())):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        self._zero._post_step(())


def zero_of(engine: Any, stage: int) -> Zero:
    """The wrapper for the optimizer that DeepSpeed has chosen for `stage`."""
    if stage == 3:
        return _Stage3(engine)
    if isinstance(engine.optimizer, BF16_Optimizer):
        return _Bf16Stage1(engine)
    return _Stage1And2(engine)
