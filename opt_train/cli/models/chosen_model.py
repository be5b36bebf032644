"""The model of the checkpoint that a verb is about, loaded where the run's configuration says."""

import torch

from opt_train.checkpoint.manifest import CheckpointError, ReportProgress
from opt_train.evaluate.load import device_of
from opt_train.evaluate.load import load_model as load
from opt_train.model.decoder import OPT
from opt_train.run.checkpoint_choice import CheckpointChoice


def choose_device(choice: CheckpointChoice) -> torch.device:
    """Where to evaluate; sets the run's number of threads."""
    if choice.config.train.threads:
        torch.set_num_threads(choice.config.train.threads)
    return device_of(choice.config)


def load_model(choice: CheckpointChoice, device: torch.device, progress: ReportProgress) -> OPT:
    """The chosen checkpoint's model, without dropout and gradients.

    Raises:
        BadInput: the checkpoint is damaged, or has gone meanwhile.
    """
    try:
        return load(
            choice.config, choice.folder, choice.checkpoint.manifest_sha256, device, progress
        )
    except CheckpointError as error:
        raise choice.damaged(error) from None
