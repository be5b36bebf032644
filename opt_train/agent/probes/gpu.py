"""The GPUs of a node as NVIDIA's management library (NVML) sees them: ECC, Xid, lost GPUs.

NVML hangs on sick GPUs, so a child reads it (``python -m opt_train.agent.probes.gpu``) and prints a
`GpuReading` a line, every second. The agent compares each with the one before and publishes what
has changed as a `NodeFinding`. A child that says nothing for `DEADLINE_SECONDS` is killed and
started anew: that NVML hangs is noted, and changes nothing by itself (invariant 11).

Counters are volatile: they count from the last load of the driver. What they were when the agent
came is somebody else's story; what they do from then on is ours. A row that waits for a reset, or
that could not be remapped, is a condition and counts from the first look.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from opt_train.diagnosis.causes import Cause, EccDetail
from opt_train.host import signals
from opt_train.host.processes import die_with_parent
from opt_train.protocol.facts import GpusSeen, LogLine, NodeFinding, NodeGpu

READ_SECONDS = 1.0
DEADLINE_SECONDS = 15.0
"""Loading the driver of a node with eight GPUs takes some seconds the first time."""
AGAIN_SECONDS = 30.0
NO_LIBRARY = 4
"""Exit code of a child without NVML or without GPUs: there is nothing to watch here."""
LINE_BYTES_MAX = 1 << 16

XID_MEANING = {
    63: (Cause.GPU_ECC, EccDetail.REMAP_PENDING),
    64: (Cause.GPU_ECC, EccDetail.REMAP_FAILED),
    79: (Cause.GPU_LOST, "fallen off the bus"),
    94: (Cause.GPU_ECC, EccDetail.CONTAINED),
    95: (Cause.GPU_ECC, EccDetail.UNCONTAINED),
}
"""Xid -> cause and detail, after NVIDIA's catalogue of Xid errors. Others are logged."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU at one moment; None: NVML does not say."""

    index: int
    uuid: str = ""
    ecc_uncorrected: int | None = None
    """Volatile uncorrectable errors, all memories."""
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    lost: bool = False
    serial: str = ""
    pci: str = ""

    @property
    def gpu(self) -> NodeGpu:
        """Which one it is."""
        return NodeGpu(self.index, self.uuid, self.serial, self.pci)


@dataclass(frozen=True, slots=True)
class GpuReading:
    """All GPUs of the node, and the Xid events (GPU index, Xid) since the reading before."""

    gpus: tuple[GpuState, ...]
    xids: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, line: bytes) -> "GpuReading":
        """Raises ValueError, TypeError or KeyError: the child printed something else."""
        fields = json.loads(line)
        return cls(
            tuple(GpuState(**gpu) for gpu in fields["gpus"]),
            tuple((int(index), int(xid)) for index, xid in fields["xids"]),
        )


def findings_between(before: GpuReading | None, now: GpuReading) -> Iterator[NodeFinding]:
    """What `now` says that `before` did not. `before` None: the first reading."""
    known = {gpu.index: gpu for gpu in before.gpus} if before is not None else {}
    by_index = {gpu.index: gpu for gpu in now.gpus}
    for index, xid in now.xids:
        gpu = by_index.get(index, GpuState(index))
        if xid not in XID_MEANING:
            log.warning("%s: Xid %d", _name(gpu), xid)
            continue
        cause, detail = XID_MEANING[xid]
        permanent = detail != EccDetail.CONTAINED
        was = known.get(index, gpu)
        yield _finding(cause, detail, f"Xid {xid}", was, gpu, permanent=permanent)
    explained = {index for index, xid in now.xids if xid in (94, 95)}
    for gpu in now.gpus:
        was = known.get(gpu.index, GpuState(gpu.index))
        if gpu.lost and not was.lost:
            yield _finding(Cause.GPU_LOST, "lost", "NVML calls it lost", was, gpu)
        if gpu.remap_pending and not was.remap_pending:
            text = "a row waits to be remapped"
            yield _finding(Cause.GPU_ECC, EccDetail.REMAP_PENDING, text, was, gpu)
        if gpu.remap_failed and not was.remap_failed:
            text = "a row could not be remapped"
            yield _finding(Cause.GPU_ECC, EccDetail.REMAP_FAILED, text, was, gpu)
        grown = (
            was.ecc_uncorrected is not None
            and gpu.ecc_uncorrected is not None
            and gpu.ecc_uncorrected > was.ecc_uncorrected
        )
        # Where an Xid says whether the error was contained, its word is better than the counter's.
        if grown and gpu.index not in explained:
            errors = f"{was.ecc_uncorrected} -> {gpu.ecc_uncorrected}"
            text = f"volatile uncorrectable ECC errors {errors}"
            yield _finding(Cause.GPU_ECC, EccDetail.UNCONTAINED, text, was, gpu)


def _finding(
    cause: Cause,
    detail: str,
    text: str,
    was: GpuState,
    gpu: GpuState,
    *,
    permanent: bool = True,
) -> NodeFinding:
    evidence = (
        LogLine("nvml", 0, f"{_name(gpu)}: {text}"),
        LogLine("nvml", 0, _counters(was, gpu)),
    )
    return NodeFinding(
        cause, detail, permanent=permanent, confidence=0.95, evidence=evidence, gpu=gpu.gpu
    )


def _name(gpu: GpuState) -> str:
    return f"GPU {gpu.index} ({gpu.uuid})" if gpu.uuid else f"GPU {gpu.index}"


def _counters(was: GpuState, gpu: GpuState) -> str:
    """What an admin asks for: all counters of the GPU, before and after."""
    values = (
        ("uncorrectable ECC errors", was.ecc_uncorrected, gpu.ecc_uncorrected),
        ("row waits to be remapped", was.remap_pending, gpu.remap_pending),
        ("row could not be remapped", was.remap_failed, gpu.remap_failed),
    )
    said = (f"{name} {_shown(before)} -> {_shown(after)}" for name, before, after in values)
    return f"GPU {gpu.index}, before -> after: {', '.join(said)}"


def _shown(value: int | bool | None) -> str:
    if value is None:
        return "unknown"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def carried_over(before: GpuReading | None, now: GpuReading) -> GpuReading:
    """`now`, with what it could not read taken from `before`: a lost GPU keeps its name."""
    known = {gpu.index: gpu for gpu in before.gpus} if before is not None else {}

    def complete(gpu: GpuState) -> GpuState:
        old = known.get(gpu.index)
        if old is None:
            return gpu
        fields = {k: v for k, v in asdict(gpu).items() if v is None or v == ""}
        return replace(gpu, **{k: getattr(old, k) for k in fields})

    return replace(now, gpus=tuple(complete(gpu) for gpu in now.gpus))


class GpuProbe:
    """Watches until cancelled; `publish` takes each finding, and which GPUs there are."""

    def __init__(self, publish: Callable[[NodeFinding | GpusSeen], None]) -> None:
        self._publish = publish
        self.last: GpuReading | None = None
        """What was read last."""

    @property
    def gpus(self) -> tuple[NodeGpu, ...]:
        """The GPUs of the node, as far as they were read."""
        return tuple(state.gpu for state in self.last.gpus) if self.last is not None else ()

    async def run(self) -> None:
        while await self._watch_once():
            await asyncio.sleep(AGAIN_SECONDS)

    async def _watch_once(self) -> bool:
        """Read one child to its end; False: there is nothing to watch on this node."""
        with signals.blocked():
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "opt_train.agent.probes.gpu"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
                preexec_fn=die_with_parent(os.getpid()),
            )
        assert child.stdout is not None
        try:
            while line := await asyncio.wait_for(child.stdout.readline(), DEADLINE_SECONDS):
                now = carried_over(self.last, GpuReading.parse(line))
                for finding in findings_between(self.last, now):
                    log.error("%s: %s", finding.cause, finding.evidence[0].text)
                    self._publish(finding)
                # A GPU is exchanged while its node is down, but a driver may count them late.
                before, self.last = self.gpus, now
                if self.gpus != before:
                    self._publish(GpusSeen(self.gpus))
        except TimeoutError:
            text = f"NVML has not answered for {DEADLINE_SECONDS:g} s"
            log.error("%s", text)
            evidence = (LogLine("nvml", 0, text),)
            self._publish(
                NodeFinding(Cause.UNKNOWN, "NVML hangs", False, confidence=0.5, evidence=evidence)
            )
        except (ValueError, TypeError, KeyError) as error:
            log.error("the probe of the GPUs printed what cannot be read: %s", error)
        finally:
            # Of one that has ended, to send a signal would take the exit code from asyncio.
            if not child.stdout.at_eof():
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
            code = await child.wait()
        return code != NO_LIBRARY


# The child ----------------------------------------------------------------------------------------


class Nvml:
    """NVML through NVIDIA's binding. Every call may hang."""

    def __init__(self) -> None:
        import pynvml  # noqa: PLC0415 - in the child alone

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self.count = pynvml.nvmlDeviceGetCount()
        self._events = pynvml.nvmlEventSetCreate()
        for index in range(self.count):
            with contextlib.suppress(pynvml.NVMLError):  # not every GPU has Xid events
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                pynvml.nvmlDeviceRegisterEvents(
                    handle, pynvml.nvmlEventTypeXidCriticalError, self._events
                )

    def read(self) -> GpuReading:
        """All GPUs now, and the Xid events of the next `READ_SECONDS`."""
        xids = tuple(self._wait_for_xids())
        return GpuReading(tuple(self._gpu(index) for index in range(self.count)), xids)

    def _wait_for_xids(self) -> Iterator[tuple[int, int]]:
        milliseconds = int(1000 * READ_SECONDS)
        while True:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, milliseconds)
                yield self._nvml.nvmlDeviceGetIndex(event.device), int(event.eventData)
            except self._nvml.NVMLError:  # none in time
                return
            milliseconds = 1

    def _gpu(self, index: int) -> GpuState:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            remapped = self._known(nvml.nvmlDeviceGetRemappedRows, handle)
            pci = self._known(nvml.nvmlDeviceGetPciInfo, handle)
            return GpuState(
                index,
                self._known(nvml.nvmlDeviceGetUUID, handle) or "",
                self._known(
                    nvml.nvmlDeviceGetTotalEccErrors,
                    *(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
                ),
                bool(remapped[2]) if remapped is not None else None,
                bool(remapped[3]) if remapped is not None else None,
                # Boards for consumers have none.
                serial=_text(self._known(nvml.nvmlDeviceGetSerial, handle)),
                pci=_text(pci.busId) if pci is not None else "",
            )
        except nvml.NVMLError_GpuIsLost:
            return GpuState(index, lost=True)

    def _known(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return call(*arguments)
        except self._nvml.NVMLError_GpuIsLost:
            raise
        except self._nvml.NVMLError:  # not supported by this GPU, or by this driver
            return None


def _text(value: str | bytes | None) -> str:
    """As some versions of the binding answer, and others."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value or ""


def main() -> int:
    """Print a reading a line for ever."""
    signals.ignore()
    try:
        nvml = Nvml()
    except Exception as error:
        print(f"GPUs are not watched: {error}", file=sys.stderr)
        return NO_LIBRARY
    if nvml.count == 0:
        return NO_LIBRARY
    while True:
        print(json.dumps(asdict(nvml.read())), flush=True)


if __name__ == "__main__":
    sys.exit(main())
