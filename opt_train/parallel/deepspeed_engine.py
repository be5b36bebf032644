"""The model spread over all ranks with DeepSpeed's ZeRO, stages 1 to 3 (Rajbhandari et al. 2020,
arXiv 1910.02054).

DeepSpeed partitions, gathers and sums. Loss scale, clipping and the decision to skip are the
trainer's, on the device. Importing this file costs seconds, and stage 3 replaces
`torch.nn.functional.linear` for the whole process.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opt_train.checkpoint.manifest import CheckpointError
from opt_train.checkpoint.tensors import MODEL, OPTIMIZER
from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Block
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import GradNorm, UpdateDecision, global_norm
from opt_train.optim.per_layer_norms import LayerSquares
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.deepspeed_zero import zero_of
from opt_train.parallel.engine import EngineSpec, Sums, loss_of
from opt_train.parallel.fsdp import TYPES, build, make_mesh
from opt_train.parallel.layout import Layout
from opt_train.parallel.recompute import recompute_and_compile
from opt_train.parallel.rows import own_rows, whole_of
from opt_train.protocol.exits import BadInput

# Its logger, made as it loads, and some of its parts write to stdout.
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeed:
    """`Engine` with ZeRO; `MeasuresLayers` too. One a process: DeepSpeed keeps process-wide
    state."""

    def __init__(self, spec: EngineSpec) -> None:
        """Build and partition the model, with torch's optimizer. Needs a process group; all ranks
        together.

        Meanwhile a rank holds, in stages 1 and 2, the whole model in the compute type, as it does
        ever after; in stage 3 its partitions and one layer's parameters whole. Its rows of the
        initial weights come on top of that for a while, in fp32, before there are moments: the peak
        is below what training takes.

        Raises:
            BadInput: DeepSpeed computes on another kind of device.
        """
        device = spec.device
        _take_over(device)
        self._device = device
        self._layout = Layout(replicate=1, shard=dist.get_world_size(), tensor=1)
        self._mesh = make_mesh(self._layout, device)
        settings = _settings(spec)
        with contextlib.redirect_stdout(io.StringIO()):
            module = _construct(spec, settings)
            self.optimizer = _make_optimizer(module, spec.model, spec.values)
            self.model, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=settings
            )
        self._zero = zero_of(self.model, spec.parallel.zero_stage)
        self._parameters = dict(module.named_parameters())
        if spec.seed is not None:
            self._initialise(spec)
        for master in self._zero.masters():
            self.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS},
            }
        self._zero.link_moments()
        self._layers = LayerSquares(
            list(self._parameters), [1] * len(self._parameters), spec.model.layers, device
        )

    def _initialise(self, spec: EngineSpec) -> None:
        """The initial weights that every engine has: each rank draws rows of them, as for FSDP2."""
        fsdp = replace(
            spec,
            precision=PrecisionConfig(compute="fp32"),
            parallel=ParallelConfig(),
            layout=self._layout,
            fused="torch",
        )
        rows = dict(build(fsdp).named_parameters())
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._zero.set_whole(parameter, whole_of(rows.pop(name)))
        self._zero.refresh()

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], grad_scale: Tensor | None = None
    ) -> Sums:
        """See `Engine`."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        activation_squares = torch.zeros((), dtype=torch.float32, device=self._device)
        for number, batch in enumerate(micro_batches, start=1):
            # By hand, because DeepSpeed's own count takes every step to have as many.
            self.model.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = loss_of(self.model, batch, self._device, grad_scale)
            self.model.backward(loss.loss_sum)
            loss_sum += loss.loss_sum.detach()
            activation_squares += loss.activation_squares
        return Sums(loss_sum, activation_squares)

    def embedding_gradients(self) -> list[Tensor]:
        """See `Engine`."""
        gradients = self._zero.gradients(self._parameters.values())
        return [gradients[number] for number in self._layers.embedding]

    def grad_norm(
        self, tokens: Tensor, grad_scale: Tensor | None = None, loss_sum: Tensor | None = None
    ) -> GradNorm:
        """See `Engine`."""
        parts = self._zero.gradients(self._parameters.values())
        ranks = self._zero.averaged_over
        losses = None if loss_sum is None else loss_sum / ranks
        copies, embedding = [1] * len(parts), self._layers.embedding
        return global_norm(parts, copies, tokens / ranks, grad_scale, losses, embedding)

    def weights(self) -> list[Tensor]:
        """See `MeasuresLayers`."""
        return self._zero.weights(self._parameters.values())

    def layer_squares(self, divisor: Tensor) -> Tensor:
        """See `MeasuresLayers`."""
        of_gradients = self._layers.of(self._zero.gradients(self._parameters.values()))
        of_weights = self._layers.of(self.weights())
        return torch.stack([of_gradients / divisor.square(), of_weights])

    def apply(self, decision: UpdateDecision) -> None:
        """See `Engine`."""
        # The attributes that torch.amp.GradScaler sets: the kernel skips, and multiplies, on the
        # device.
        self.optimizer.found_inf = decision.skip  # type: ignore[attr-defined]
        self.optimizer.grad_scale = decision.factor.reciprocal()  # type: ignore[attr-defined]
        self._zero.step()

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine`; copies, of which one parameter's at a time exist whole."""
        step = self._step_count()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[MODEL + name] = own_rows(safe_get_full_fp32_param(parameter), self._mesh)
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                tensors[f"{OPTIMIZER}{name}.{key}"] = own_rows(whole, self._mesh)
            tensors[f"{OPTIMIZER}{name}.step"] = step.clone()
        return tensors

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`.

        Raises:
            CheckpointError: parameters differ in their number of updates, of which ZeRO keeps one.
        """
        steps = torch.stack([tensors[f"{OPTIMIZER}{name}.step"] for name in self._parameters])
        if (steps != steps[0]).any():
            raise CheckpointError(
                "its parameters have had different numbers of updates, which ZeRO cannot hold"
            )
        for name, parameter in self._parameters.items():
            self._zero.set_whole(parameter, whole_of(tensors[MODEL + name]))
            for key in MOMENTS:
                self._zero.set_whole(parameter, whole_of(tensors[f"{OPTIMIZER}{name}.{key}"]), key)
        for master in self._zero.masters():
            self.optimizer.state[master]["step"].copy_(steps[0])
        self._zero.refresh()

    def _step_count(self) -> Tensor:
        step: Tensor = self.optimizer.state[self._zero.masters()[0]]["step"]
        return step


def _take_over(device: torch.device) -> None:
    """Make DeepSpeed use the process group and the device that the trainer has chosen."""
    if (found := get_accelerator().device_name()) != device.type:
        raise BadInput(
            f"DeepSpeed has taken to {found}, but train.device is {device.type}; "
            f"start with DS_ACCELERATOR={device.type} in the environment"
        )
    # It was written for an older torch; this one warns at every collective.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+_tensor` is deprecated"
    )
    # The only way it takes its device.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
        )
    # It would clone the group, without the trainer's timeout: half an hour until a rank notices
    # that others are gone.
    groups._WORLD_GROUP = dist.group.WORLD


def _settings(spec: EngineSpec) -> dict[str, Any]:
    """DeepSpeed's configuration: everything that the trainer does itself is off."""
    stage = spec.parallel.zero_stage
    bf16 = spec.precision.compute == "bf16"
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # Biases and LayerNorms stay whole between steps: gathering one costs more than it weighs.
        zero["stage3_param_persistence_threshold"] = spec.model.ffn
    elif not (bf16 and stage == 1):
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        **({} if stage == 3 else {"gradient_allreduce_op": "sum"}),
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }


def _construct(spec: EngineSpec, settings: dict[str, Any]) -> OPT:
    """The model, its weights anything; in stage 3 each layer is partitioned as soon as it is
    there."""
    parallel = spec.parallel
    if parallel.zero_stage == 3:
        # Its type is that of the settings; one given to Init is ignored where fp16 is not supported
        # (0.19.8).
        with deepspeed.zero.Init(config_dict_or_path=settings):
            module = OPT(spec.model)
        # The head multiplies with the parameter of another module.
        deepspeed.zero.register_external_parameter(module, module.model.decoder.embed_tokens.weight)
    else:
        with torch.device("meta"):
            module = OPT(spec.model).to(TYPES[spec.precision.compute])
        module.to_empty(device=spec.device)
    for block in module.model.decoder.layers:
        assert isinstance(block, Block)
        recompute_and_compile(block, parallel.activation_checkpointing, parallel.compile)
    return module


def _make_optimizer(
    module: OPT, config: ModelConfig, values: Mapping[str, float]
) -> torch.optim.AdamW:
    """torch's fused AdamW, weight decay on matrices alone; DeepSpeed puts flat partitions into its
    groups."""
    with torch.device("meta"):
        # A partitioned parameter has no shape of its own.
        matrices = {
            name for name, parameter in OPT(config).named_parameters() if parameter.ndim > 1
        }
    named = list(module.named_parameters())
    parameters = [
        {"params": [parameter for name, parameter in named if name in matrices], "decayed": True},
        {
            "params": [parameter for name, parameter in named if name not in matrices],
            "decayed": False,
        },
    ]
    optimizer = torch.optim.AdamW(parameters, lr=values["lr"], fused=True)
    put_in_force(optimizer, values)
    return optimizer
