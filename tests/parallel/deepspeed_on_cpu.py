"""What DeepSpeed does on a machine without a GPU and tests can do without: it compiles a collective
of its own.

The engine itself knows nothing of this.
"""

import os

import torch


def apply() -> None:
    """Let DeepSpeed start in seconds on CPU and gloo. Once in a process, before the engine is
    imported."""
    if torch.cuda.is_available():
        return
    # Told to, it does not warn that it found no GPU.
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
