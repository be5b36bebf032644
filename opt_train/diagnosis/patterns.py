"""Lines of logs that show a cause: one table, most telling first. A new failure is a line here and
a test."""

import re
from dataclasses import dataclass

from opt_train.diagnosis.causes import Cause, EccDetail


@dataclass(frozen=True, slots=True)
class Indication:
    """What a piece of evidence points to, and how sure it makes one (0 to 1)."""

    cause: Cause
    detail: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Pattern:
    """A line that matches `expression` is an `indication`."""

    indication: Indication
    expression: re.Pattern[str]


def _pattern(cause: Cause, detail: str, confidence: float, expression: str) -> Pattern:
    return Pattern(Indication(cause, detail, confidence), re.compile(expression))


ROOTS: tuple[Pattern, ...] = (
    # Xid numbers are NVIDIA's: 48 double-bit ECC, 63 and 64 row remapping recorded and failed,
    # 74 NVLink, 79 fallen off the bus, 94 and 95 contained and uncontained ECC, 119 and 120 GSP.
    _pattern(Cause.GPU_ECC, EccDetail.REMAP_FAILED, 0.97, r"Xid.*\b64\b|[Rr]ow remap\w* fail"),
    _pattern(
        Cause.GPU_ECC,
        EccDetail.UNCONTAINED,
        0.97,
        r"Xid.*\b95\b|[Uu]ncontained (?:ECC )?(?:memory )?error",
    ),
    _pattern(
        Cause.GPU_ECC,
        EccDetail.CONTAINED,
        0.95,
        r"Xid.*\b94\b|[Cc]ontained (?:ECC )?(?:memory )?error",
    ),
    _pattern(
        Cause.GPU_ECC,
        EccDetail.UNCONTAINED,
        0.95,
        r"uncorrectable ECC error|Xid.*\b48\b|Double Bit ECC",
    ),
    _pattern(Cause.GPU_ECC, EccDetail.REMAP_PENDING, 0.9, r"Xid.*\b63\b|[Rr]ow remap\w* pending"),
    _pattern(Cause.GPU_LOST, "the GPU fell off the bus", 0.98, r"Xid.*\b79\b|fallen off the bus"),
    _pattern(
        Cause.GPU_LOST,
        "the GPU does not answer",
        0.95,
        r"GPU is lost|CUDA.*no CUDA-capable device|Unable to determine the device handle",
    ),
    _pattern(
        Cause.GPU_FAULT,
        "the GPU's driver or firmware stopped",
        0.9,
        r"Xid.*\b(?:61|62|119|120|140)\b|GSP RPC timeout",
    ),
    _pattern(Cause.GPU_FAULT, "an NVLink error", 0.9, r"Xid.*\b74\b|NVLink.*(?:fatal|error)"),
    _pattern(
        Cause.GPU_OOM,
        "out of GPU memory",
        0.97,
        r"torch\.(?:cuda\.)?OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|"
        r"CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _pattern(
        Cause.ILLEGAL_ACCESS,
        "an illegal memory access in a kernel",
        0.93,
        r"illegal memory access|misaligned address|device-side assert",
    ),
    _pattern(
        Cause.HOST_OOM,
        "the kernel's out-of-memory killer",
        0.97,
        r"oom[-_]kill|Out of memory: Kill|Memory cgroup out of memory|invoked oom-killer",
    ),
    _pattern(
        Cause.HOST_OOM,
        "an allocation on the host failed",
        0.9,
        r"^MemoryError|DefaultCPUAllocator: can't allocate memory|"
        r"Cannot allocate memory|std::bad_alloc",
    ),
    _pattern(
        Cause.STORAGE, "no space left", 0.95, r"No space left on device|ENOSPC|Disk quota exceeded"
    ),
    _pattern(
        Cause.STORAGE,
        "the file system answers with errors",
        0.93,
        r"\[Errno 5\]|Input/output error|\bEIO\b",
    ),
    _pattern(Cause.STORAGE, "a stale file handle", 0.93, r"Stale file handle|\bESTALE\b"),
    _pattern(
        Cause.STORAGE, "the file system is read-only", 0.93, r"Read-only file system|\bEROFS\b"
    ),
    _pattern(
        Cause.CORRUPT_CHECKPOINT,
        "a checkpoint does not hold what its manifest says",
        0.9,
        r"checkpoint.*(?:checksum|sha256|does not verify|corrupt)",
    ),
    _pattern(
        Cause.DATA,
        "the training data is not what it claims to be",
        0.85,
        r"(?:BadInput|prepare).*\b(?:data|shard|corpus)\b|[Ss]hard .*(?:checksum|sha256|missing)",
    ),
    _pattern(
        Cause.PREEMPTION,
        # To the dying job a cancel by a person and a requeue look the same: the scheduler is named,
        # and not who asked it.
        "the scheduler ended the job",
        0.9,
        r"slurmstepd.*CANCELLED.*(?:DUE TO|AT)|DUE TO (?:TIME LIMIT|PREEMPTION|NODE FAILURE)",
    ),
    _pattern(
        Cause.LOSS_NAN,
        "the loss is not a number",
        0.85,
        r"[Ll]oss is (?:nan|NaN|not finite|non-finite)",
    ),
)
"""Causes of their own. The first in the table that any rank shows is the root."""

VICTIMS: tuple[Pattern, ...] = (
    _pattern(
        Cause.COLLECTIVE_TIMEOUT,
        # NCCL ranks notice a lost peer by this timeout alone, up to minutes after gloo would have.
        "a collective timed out",
        0.6,
        r"Watchdog caught collective operation timeout|[Cc]ollective operation timeout|"
        r"[Tt]imed out (?:after )?waiting|Timeout waiting for key|wait timeout after",
    ),
    _pattern(
        Cause.NETWORK,
        "a peer's connection was lost",
        0.5,
        r"Connection (?:was )?(?:closed|reset) by peer|Connection reset|Broken pipe|"
        r"Connection was likely closed|Socket closed|recvValue failed|sendBytes failed|"
        r"failed to recv|"
        r"Connection refused",
    ),
    _pattern(
        Cause.NETWORK,
        "a collective failed",
        0.5,
        r"DistBackendError|NCCL (?:error|WARN).*|ncclSystemError|ncclRemoteError|ncclInternalError|"
        r"ncclUnhandledCudaError|gloo.*(?:pair|context|transport)",
    ),
)
"""What a rank says whose *peer* died. Alone, on every rank, they are all there is to go by."""

FRAME = re.compile(
    r"Traceback \(most recent call last\)|^(?:\[rank\d+\]:)?\s*File \"[^\"]+\", line \d+"
)
"""A traceback. The end of a log may hold its last frames only."""
EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?::\s|$)")
"""The last line of a traceback; torch puts `[rank0]: ` before it."""
