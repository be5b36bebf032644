"""A checkpoint as a model that only answers: whole, in one process, on one device."""

from collections.abc import Callable
from pathlib import Path

import torch

from opt_train.checkpoint import manifest
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.tensors import ModelAndOptimizer
from opt_train.config.run_config import RunConfig
from opt_train.model.decoder import OPT
from opt_train.parallel.fsdp import TYPES


def device_of(config: RunConfig) -> torch.device:
    """Where to evaluate: as the run trains, but the CPU will do where there is no GPU."""
    usable = config.train.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if usable else "cpu")


def load_model(
    config: RunConfig,
    folder: Path,
    manifest_sha256: str,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> OPT:
    """The model of a committed checkpoint, in the type that training computes in, without dropout
    and gradients.

    Args:
        manifest_sha256: the checkpoint's, as the journal has it.
        progress: called with the bytes read and in all.

    Raises:
        CheckpointError: it does not verify, or is of another model.
    """
    committed = manifest.read(folder, manifest_sha256)
    # On meta first: initial weights would only be drawn to be overwritten.
    with torch.device("meta"):
        model = OPT(config.model).to(TYPES[config.precision.weights])
    model.to_empty(device=device)
    restore(ModelAndOptimizer(model), folder, committed, progress=progress)
    return model.to(TYPES[config.precision.compute]).eval().requires_grad_(False)
