"""`train.deterministic`: the same bits on every run of the same layout, or an error that names the
kernel."""

import os
import re

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_CHOICES = (":4096:8", ":16:8")
"""The settings under which cuBLAS is deterministic (cuBLAS documentation, "Results
reproducibility")."""


def be_deterministic() -> None:
    """From now on torch takes deterministic kernels alone. Before the first product on a GPU:
    cuBLAS reads its setting once.
    """
    # Somebody's own choice stays, if it is one that is deterministic.
    if os.environ.get(_CUBLAS) not in _CUBLAS_CHOICES:
        os.environ[_CUBLAS] = _CUBLAS_CHOICES[0]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    # Its search times kernels and takes the fastest, another one each time.
    torch.backends.cudnn.benchmark = False


def explain(error: RuntimeError) -> str | None:
    """A sentence for a person, where `error` is torch's complaint that a kernel cannot do it;
    otherwise None."""
    if not torch.are_deterministic_algorithms_enabled():
        return None
    text = str(error)
    if found := re.match(r"(\S+) does not have a deterministic implementation", text):
        kernel = found[1]
    elif _CUBLAS in text:
        kernel = "cuBLAS, as the environment sets it up,"
    else:
        return None
    return (
        f"train.deterministic=true, but {kernel} has no deterministic kernel here; set "
        "train.deterministic=false"
    )
