"""A stand-in for NVIDIA's management library, which the real binding loads: `fake_nvml.c`."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")


def build(folder: Path) -> dict[str, str]:
    """Build the library into `folder`; the environment that makes the binding find it."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "a stand-in for NVML needs a C compiler"
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


def set_values(disk: Path, node: str = "", **values: int) -> None:
    """What the library of a node answers from now on: ``count=1``, ``gpu0_ecc=1``. The GPUs of
    `node`, ``n3``, have UUIDs and serial numbers of their own."""
    if node:
        values["node"] = int(node.removeprefix("n"))
    lines = (
        f"{key.removeprefix('gpu').replace('_', '.', 1)} {value}\n" for key, value in values.items()
    )
    new = disk / "fake_nvml.new"
    new.write_text("".join(lines))
    os.replace(new, disk / "fake_nvml")


def raise_xid(disk: Path, gpu: int, xid: int) -> None:
    """One Xid event."""
    with open(disk / "fake_nvml.xid", "a") as file:
        file.write(f"{gpu} {xid}\n")
