"""Which cores each rank of a node runs on: those beside its GPU.

A rank whose threads run on the other socket copies every byte to its GPU over the link between the
sockets, and memory is taken where its thread first touches it. So a rank is bound to the cores of
its GPU's NUMA node, as the kernel says them in /sys; ranks whose GPUs share a NUMA node divide its
cores, a core with all its hardware threads. Without GPUs all cores are divided. What cannot be read
binds nothing.

A rank's GPU is the one that CUDA gives it: of those in CUDA_VISIBLE_DEVICES the one with the slot's
number, counted by PCI address, as the devices of one kind are.
"""

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

SYSTEM = Path("/sys")
_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"
"""Of PCI: display controllers, 3D controllers among them."""


def cores_of_slots(
    slots: int, allowed: Collection[int], visible: str | None, system: Path = SYSTEM
) -> list[frozenset[int]]:
    """The cores of each slot's rank; an empty set leaves it unbound.

    Args:
        allowed: the cores that this node's processes may use.
        visible: CUDA_VISIBLE_DEVICES; None: it is not set.
        system: where the kernel describes the machine.
    """
    # Without GPUs. Where there are some, a rank whose own is not known is better left to the kernel
    # than bound to the wrong socket.
    near = [frozenset(allowed)] * slots
    if devices := gpus_of(system):
        chosen = gpus_of_slots(slots, visible, devices)
        near = [cores_beside(gpu, system) & set(allowed) if gpu else frozenset() for gpu in chosen]
    bound: list[frozenset[int]] = []
    for slot in range(slots):
        sharing = [other for other in range(slots) if near[other] == near[slot]]
        bound.append(share_of(near[slot], sharing.index(slot), len(sharing), system))
    return bound


def gpus_of(system: Path) -> list[str]:
    """PCI addresses of the machine's GPUs, in their order."""
    return sorted(
        path.name
        for path in (system / "bus/pci/devices").glob("*")
        if _read(path / "vendor") == _NVIDIA and _read(path / "class").startswith(_DISPLAY_CLASS)
    )


def gpus_of_slots(slots: int, visible: str | None, devices: Sequence[str]) -> list[str]:
    """Of the GPUs `devices` the one of each slot; empty: it has none, or none that is known, as of
    a name by UUID."""
    chosen: Sequence[str] = [str(index) for index in range(len(devices))]
    if visible is not None:
        chosen = visible.split(",")
    found = []
    for slot in range(slots):
        number = chosen[slot].strip() if slot < len(chosen) else ""
        known = number.isascii() and number.isdecimal() and int(number) < len(devices)
        found.append(devices[int(number)] if known else "")
    return found


def cores_beside(gpu: str, system: Path) -> frozenset[int]:
    """The cores of the NUMA node that the PCI device is on; none: the kernel does not say."""
    device = system / "bus/pci/devices" / gpu
    cores = parse_cores(_read(device / "local_cpulist"))
    node = _read(device / "numa_node")
    if cores or not node.isdecimal():  # -1: it is on none
        return cores
    return parse_cores(_read(system / f"devices/system/node/node{node}/cpulist"))


def share_of(cores: frozenset[int], part: int, parts: int, system: Path) -> frozenset[int]:
    """The `part`-th of `parts` even shares of `cores`, whole cores with all their hardware threads;
    all of `cores` where there are fewer than parts."""
    # By cores, not by numbers: the kernel counts all first threads, then all second ones, and half
    # of a list would be one thread of each core, whose other thread another rank would have.
    groups = sorted({_siblings(core, system) & cores for core in cores}, key=min)
    if len(groups) < parts:
        return cores
    begin, end = part * len(groups) // parts, (part + 1) * len(groups) // parts
    return frozenset().union(*groups[begin:end])


def _siblings(core: int, system: Path) -> frozenset[int]:
    path = system / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list"
    return parse_cores(_read(path)) | {core}


def parse_cores(text: str) -> frozenset[int]:
    """The numbers of a list as the kernel writes it, such as ``0-15,64-79``; none of other text."""
    cores: set[int] = set()
    with contextlib.suppress(ValueError):
        for part in text.split(",") if text else ():
            first, dash, last = part.partition("-")
            cores |= set(range(int(first), int(last if dash else first) + 1))
    return frozenset(cores)


def format_cores(cores: Collection[int]) -> str:
    """As the kernel would write them: the inverse of `parse_cores`."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def bind(cores: Collection[int]) -> None:
    """Have this thread run on `cores` alone, and every one that it will start; none, or where the
    kernel forbids it: leave it as it is."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
