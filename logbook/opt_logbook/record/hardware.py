"""Hardware that journal lines name: GPUs, and what nodes were taken out of runs for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """Which GPU it is, whatever node it is built into; what its driver does not say is empty."""

    index: int
    """Among those of its node."""
    uuid: str = ""
    serial: str = ""
    """Of the board, as its label has it."""
    pci: str = ""
    """Its address on the bus."""


@dataclass(frozen=True, slots=True)
class Offence:
    """A node was taken out of a run for bad hardware."""

    time: float
    """Unix seconds."""
    run: str
    node: str
    cause: str
    detail: str = ""
    gpu: str = ""
    """UUID of the GPU that failed; empty: it was no single one, or is not known."""
