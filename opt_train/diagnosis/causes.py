"""What can be behind an incident or a node's finding: every cause this system knows. One table.

A cause is one row of `CAUSES`: its label (what the journal says), whom it blames (who must act) and
what it means (for a person). Three things more belong to a cause and stand where their room is,
each proven complete by a test: what is done about it is `supervisor.rules.responses.RESPONSES`, the
log lines that show it are `patterns.py`, and the words of the chronicle are `CAUSES` of
`opt_logbook.story.format`, which imports nothing of ours. docs/causes.md is printed from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Blame(StrEnum):
    """Who must act on a cause. Hardware is never blamed for a user's bug."""

    HARDWARE = "hardware"
    SOFTWARE = "software"
    NETWORK = "network"
    UNKNOWN = "unknown"
    STORAGE = "storage"
    NUMERICS = "numerics"
    SCHEDULER = "scheduler"
    PERSON = "person"
    NONE = "none"


class Cause(StrEnum):
    """A cause's label: what the journal, the chronicle and `opt-train diagnose` call it."""

    GPU_ECC = "gpu_ecc"
    GPU_LOST = "gpu_lost"
    GPU_FAULT = "gpu_fault"
    SILENT_CORRUPTION = "silent_corruption"
    NODE_FAILURE = "node_failure"
    STRAGGLER = "straggler"
    ILLEGAL_ACCESS = "illegal_access"
    GPU_OOM = "gpu_oom"
    USER_CODE = "user_code"
    HOST_OOM = "host_oom"
    NETWORK = "network"
    COLLECTIVE_TIMEOUT = "collective_timeout"
    HANG = "hang"
    KILLED = "killed"
    STORAGE = "storage"
    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    DATA = "data"
    CONFIG = "config"
    LOSS_SCALE_FLOOR = "loss_scale_floor"
    LOSS_NAN = "loss_nan"
    LOSS_SPIKE = "loss_spike"
    DRIFT = "drift"
    PLATEAU = "plateau"
    PREEMPTION = "preemption"
    STOPPED = "stopped"
    NONE = "none"
    UNKNOWN = "unknown"


class EccDetail(StrEnum):
    """Details of `Cause.GPU_ECC`: they differ in what they ask for, so each has a response of its
    own. Names and meanings are NVIDIA's (GPU memory error management, Xid 94, 95, 63, 64)."""

    CONTAINED = "contained"
    """Only the process that touched the bad memory was hit; the GPU goes on."""
    UNCONTAINED = "uncontained"
    """Any process on the GPU may have read wrong numbers; the GPU needs a reset."""
    REMAP_PENDING = "remap_pending"
    """A bad row is set aside at the next reset of the GPU; until then it works."""
    REMAP_FAILED = "remap_failed"
    """There is no spare row left: the GPU is to be exchanged."""


class StorageDetail(StrEnum):
    """Details of `Cause.STORAGE` that have a response of their own."""

    NODE_DISK = "node_disk"
    """The node's own disk: another node does not have it."""


class CorruptionDetail(StrEnum):
    """Details of `Cause.SILENT_CORRUPTION`."""

    DISAGREES = "disagrees"
    """From the same weights and sequences the device computes another loss than all others."""

    NOT_REPRODUCED = "not_reproduced"
    """A step that was trained again came to other numbers: the device was wrong once."""


DRAIN = "drain"
"""Detail of `Cause.PREEMPTION`: an admin wants a node back, and waits for its work to end."""

DETAILS: Mapping[Cause, tuple[str, ...]] = {
    Cause.GPU_ECC: tuple(EccDetail),
    Cause.STORAGE: tuple(StorageDetail),
    Cause.SILENT_CORRUPTION: tuple(CorruptionDetail),
    Cause.PREEMPTION: (DRAIN,),
}
"""Cause -> its details that have a response of their own; any other detail is words for a
person."""


@dataclass(frozen=True, slots=True)
class CauseRow:
    """What is known of a cause whatever the incident: whom it blames, and its meaning in a
    sentence."""

    blame: Blame
    meaning: str


CAUSES: Mapping[Cause, CauseRow] = {
    Cause.GPU_ECC: CauseRow(
        Blame.HARDWARE, "Memory of a GPU is failing: uncorrectable ECC errors, rows to be remapped."
    ),
    Cause.GPU_LOST: CauseRow(Blame.HARDWARE, "A GPU has fallen off the bus or does not answer."),
    Cause.GPU_FAULT: CauseRow(Blame.HARDWARE, "A GPU or its driver reported a fault of its own."),
    Cause.SILENT_CORRUPTION: CauseRow(
        Blame.HARDWARE, "A device computed wrong numbers without any error."
    ),
    Cause.NODE_FAILURE: CauseRow(Blame.HARDWARE, "A node is gone, with everything on it."),
    Cause.STRAGGLER: CauseRow(Blame.HARDWARE, "A node is much slower than its peers."),
    Cause.ILLEGAL_ACCESS: CauseRow(
        Blame.SOFTWARE, "A kernel read or wrote memory that is not its own."
    ),
    Cause.GPU_OOM: CauseRow(Blame.SOFTWARE, "The job asked for more GPU memory than there is."),
    Cause.USER_CODE: CauseRow(
        Blame.SOFTWARE, "Python code raised an exception that is nobody else's doing."
    ),
    Cause.HOST_OOM: CauseRow(
        Blame.SOFTWARE, "The node ran out of memory and the kernel killed a process."
    ),
    Cause.NETWORK: CauseRow(
        Blame.NETWORK, "Ranks lost each other although all of them and their nodes were alive."
    ),
    Cause.COLLECTIVE_TIMEOUT: CauseRow(
        Blame.UNKNOWN, "A collective did not complete in time; nobody is known to have stopped."
    ),
    Cause.HANG: CauseRow(Blame.UNKNOWN, "A rank stopped moving; its process was alive."),
    Cause.KILLED: CauseRow(
        Blame.UNKNOWN, "A rank was ended by SIGKILL, or vanished, and nobody owns up to it."
    ),
    Cause.STORAGE: CauseRow(Blame.STORAGE, "A file system is full, stale or answers with errors."),
    Cause.CORRUPT_CHECKPOINT: CauseRow(
        Blame.STORAGE, "A checkpoint does not hold what its manifest says."
    ),
    Cause.DATA: CauseRow(Blame.SOFTWARE, "Training data is missing or not what it claims to be."),
    Cause.CONFIG: CauseRow(
        Blame.SOFTWARE, "The configuration cannot work, or is not what is in force."
    ),
    Cause.LOSS_SCALE_FLOOR: CauseRow(
        Blame.NUMERICS, "The loss scale fell to its floor: gradients overflow whatever the scale."
    ),
    Cause.LOSS_NAN: CauseRow(Blame.NUMERICS, "The loss is not a number."),
    Cause.LOSS_SPIKE: CauseRow(Blame.NUMERICS, "The loss jumped and stayed up."),
    Cause.DRIFT: CauseRow(Blame.NUMERICS, "Gradient or activation norms drift upwards."),
    Cause.PLATEAU: CauseRow(Blame.NUMERICS, "The loss has stopped falling."),
    Cause.PREEMPTION: CauseRow(
        Blame.SCHEDULER, "The scheduler took the nodes: time limit, preempted, or requeued."
    ),
    Cause.STOPPED: CauseRow(Blame.PERSON, "A person asked the run to stop."),
    Cause.NONE: CauseRow(
        Blame.NONE, "Nothing failed: ranks were replaced because their supervisor was."
    ),
    Cause.UNKNOWN: CauseRow(Blame.UNKNOWN, "The evidence does not say."),
}
"""Every cause has its row; in the order of docs/causes.md."""

LABELS: frozenset[str] = frozenset(Cause)
"""For a look-up by a plain string, which need not be a label."""


def cause_named(label: str) -> Cause:
    """The cause called `label`; `Cause.UNKNOWN` for one that only another version knows."""
    # A journal outlives the program: a newer one may have written a cause that is not known here.
    if label in LABELS:
        return Cause(label)
    return Cause.UNKNOWN


def blame_of(label: str) -> Blame:
    """Whom the cause `label` blames."""
    return CAUSES[cause_named(label)].blame
