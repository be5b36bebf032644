"""GPUs by their device files: no library is asked, whose calls can hang on a sick GPU."""

from pathlib import Path

DEVICES = Path("/dev")


def count_gpu_files() -> int:
    """How many NVIDIA GPUs the kernel's driver shows on this machine, whether they work or not."""
    return sum(path.name[6:].isdigit() for path in DEVICES.glob("nvidia*"))
