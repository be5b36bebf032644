"""torch's own reader of sharded safetensors: the reference for ours."""

from pathlib import Path

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load


def read_by_torch(into: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill `into`, in place, with what `folder` holds. Called by all ranks together."""
    load(into, storage_reader=HuggingFaceStorageReader(str(folder)))
