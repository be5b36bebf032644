"""A ticket for each node that a run has taken out: what an admin needs to act on it.

A pure function of the journal: what was seen, with its lines and counters, when, and what is asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from opt_logbook.record.events import Entry, Evidence, FindingNoted, IncidentDiagnosed, NodeFailed
from opt_logbook.record.hardware import GpuIdentity
from opt_logbook.record.node_events import LemonCleared, LemonNoted

from opt_train.diagnosis.causes import Blame, Cause, EccDetail, StorageDetail, blame_of

ASKED = {
    (Cause.GPU_ECC, EccDetail.UNCONTAINED): "Reset the GPU, run its memory test, and watch it.",
    (Cause.GPU_ECC, EccDetail.CONTAINED): "Reset the GPU; exchange it if it happens again.",
    (Cause.GPU_ECC, EccDetail.REMAP_PENDING): "Reset the GPU, so that the row is remapped.",
    (Cause.GPU_ECC, EccDetail.REMAP_FAILED): "Exchange the GPU: it has no spare row left.",
    (Cause.GPU_LOST, ""): "Power-cycle the node; if the GPU is lost again, reseat or exchange it.",
    (Cause.GPU_FAULT, ""): "Run the vendor's diagnostics on the GPU.",
    (Cause.SILENT_CORRUPTION, ""): "Run the vendor's diagnostics, and a longer burn-in "
    "that compares results bit by bit.",
    (Cause.NODE_FAILURE, ""): "Look at power, memory and the last lines of the system's log.",
    (Cause.STRAGGLER, ""): "Look at clocks, throttle reasons, links, and who else uses the node.",
    (Cause.STORAGE, StorageDetail.NODE_DISK): "Look at the node's disk: full, slow or failing.",
    (Cause.STORAGE, ""): "Look at the shared file system, and at the node's mount of it.",
    (Cause.NETWORK, ""): "Look at the node's links, cables and switch ports.",
    (Cause.PREEMPTION, ""): "Nothing: you wanted the node back.",
}
"""(Cause, detail) -> what an admin is asked to do; without a detail: for all that have no row."""
LOOK = "Look at the node before it is used again."


@dataclass(frozen=True, slots=True)
class Ticket:
    """One node that was taken out."""

    node: str
    time: float
    """Unix seconds."""
    attempt: str
    step: int | None
    cause: str
    detail: str
    evidence: tuple[Evidence, ...]
    asked: str
    gpu: GpuIdentity | None = None
    """The one that failed; None: it was no single GPU, or is not known."""
    before: str = ""
    """What the node has on record of other runs, and of this one before, if it is a repeat
    offender."""

    def text(self, run: str) -> str:
        """The ticket, for a person to send; `run` is the run's name."""
        when = datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        detail = f" ({self.detail})" if self.detail else ""
        lines = [
            f"{self.node}: {self.cause}{detail}",
            f"  taken out of run {run} at {when}, {self._stage}",
            *([f"  which: {_which(self.gpu)}"] if self.gpu is not None else []),
            *(f"  seen: {_place(e)}{e.text}" for e in self.evidence),
            *([f"  repeat offender: {self.before}"] if self.before else []),
            f"  asked: {self.asked}",
        ]
        return "\n".join(lines)

    @property
    def _stage(self) -> str:
        if not self.attempt:
            return "before its first attempt"
        return f"after step {self.step} of {self.attempt}" if self.step else f"in {self.attempt}"


def _which(gpu: GpuIdentity) -> str:
    named = ((gpu.uuid, "UUID"), (gpu.serial, "serial number"), (gpu.pci, "PCI address"))
    return ", ".join([f"GPU {gpu.index}", *(f"{name} {value}" for value, name in named if value)])


def _place(evidence: Evidence) -> str:
    if not evidence.file:
        return ""
    return f"{evidence.file}{f':{evidence.line}' if evidence.line else ''}: "


def tickets(entries: Iterable[Entry]) -> list[Ticket]:
    """A ticket for each node that the journal says is out, in the order in which it happened."""
    diagnosed: dict[int, IncidentDiagnosed] = {}
    lemons: dict[str, str] = {}
    found: dict[tuple[str, str], FindingNoted] = {}
    made = []
    for entry in entries:
        match entry.event:
            case IncidentDiagnosed() as event:
                diagnosed[event.incident] = event
            case LemonNoted(node=node, why=why):
                lemons[node] = why
            case LemonCleared(node):
                lemons.pop(node, None)
            case FindingNoted() as event:
                found[event.node, event.cause] = event
            case NodeFailed(node, incident, cause):
                known = diagnosed.get(incident)
                finding = found.get((node, cause))
                # The incident may be another node's: one that was lost on the way back, say.
                if known is not None and known.node == node:
                    detail, evidence = known.detail, known.evidence
                elif finding is not None:
                    detail, evidence = finding.detail, finding.evidence
                else:
                    detail, evidence = "", ()
                made.append(
                    Ticket(
                        node,
                        entry.time,
                        entry.attempt,
                        entry.step,
                        cause,
                        detail,
                        evidence,
                        asked_of(cause, detail),
                        finding.gpu if finding is not None else None,
                        lemons.get(node, ""),
                    )
                )
            case _:
                pass
    return made


def asked_of(cause: str, detail: str) -> str:
    """What an admin is asked to do about a node with this cause."""
    asked = {(str(known), of): text for (known, of), text in ASKED.items()}
    hardware = blame_of(cause) == Blame.HARDWARE
    default = "Run the vendor's diagnostics." if hardware else LOOK
    return asked.get((cause, detail)) or asked.get((cause, ""), default)
