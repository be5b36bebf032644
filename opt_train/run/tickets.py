"""A ticket for each node that a run has taken out: what an admin needs to act on it.

A pure function of the journal: what was seen, with its lines and counters, when, and what is asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from opt_logbook.record.events import (
    Entry,
    Evidence,
    FindingNoted,
    IncidentDiagnosed,
    NodeFailed,
)

from opt_train.diagnosis.causes import Blame, Cause, EccDetail, blame_of

ASKED = {
    (Cause.GPU_ECC, EccDetail.UNCONTAINED): "Reset the GPU, run its memory test, and watch it.",
    (Cause.GPU_ECC, EccDetail.CONTAINED): "Reset the GPU; exchange it if it happens again.",
    (Cause.GPU_ECC, EccDetail.REMAP_PENDING): "Reset the GPU, so that the row is remapped.",
    (Cause.GPU_ECC, EccDetail.REMAP_FAILED): "Exchange the GPU: it has no spare row left.",
    (Cause.GPU_LOST, ""): "Power-cycle the node; if the GPU is lost again, reseat or exchange it.",
    (Cause.GPU_FAULT, ""): "Run the vendor's diagnostics on the GPU.",
    (Cause.SILENT_CORRUPTION, ""): "Run a burn-in that compares results bit by bit.",
    (Cause.NODE_FAILURE, ""): "Look at power, memory and the last lines of the system's log.",
    (Cause.STRAGGLER, ""): "Look at clocks, throttle reasons, links, and who else uses the node.",
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

    def text(self, run: str) -> str:
        """The ticket, for a person to send; `run` is the run's name."""
        when = datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        detail = f" ({self.detail})" if self.detail else ""
        lines = [
            f"{self.node}: {self.cause}{detail}",
            f"  taken out of run {run} at {when}, after step {self.step} of {self.attempt}",
            *(f"  seen: {_place(e)}{e.text}" for e in self.evidence),
            f"  asked: {self.asked}",
        ]
        return "\n".join(lines)


def _place(evidence: Evidence) -> str:
    if not evidence.file:
        return ""
    return f"{evidence.file}{f':{evidence.line}' if evidence.line else ''}: "


def tickets(entries: Iterable[Entry]) -> list[Ticket]:
    """A ticket for each node that the journal says is out, in the order in which it happened."""
    diagnosed: dict[int, IncidentDiagnosed] = {}
    found: dict[str, FindingNoted] = {}
    made = []
    for entry in entries:
        match entry.event:
            case IncidentDiagnosed() as event:
                diagnosed[event.incident] = event
            case FindingNoted() as event:
                found[event.node] = event
            case NodeFailed(node, incident, cause):
                known = diagnosed.get(incident)
                # The incident may be another node's: one that was lost on the way back, say.
                if known is not None and known.node == node:
                    detail, evidence = known.detail, known.evidence
                elif node in found and found[node].cause == cause:
                    detail, evidence = found[node].detail, found[node].evidence
                else:
                    detail, evidence = "", ()
                asked = ASKED.get((Cause(cause), detail)) if cause in set(Cause) else None
                made.append(
                    Ticket(
                        node,
                        entry.time,
                        entry.attempt,
                        entry.step,
                        cause,
                        detail,
                        evidence,
                        asked or _asked_of(cause),
                    )
                )
            case _:
                pass
    return made


def _asked_of(cause: str) -> str:
    known = {str(c): text for (c, detail), text in ASKED.items() if not detail}
    hardware = blame_of(cause) == Blame.HARDWARE
    return known.get(cause) or ("Run the vendor's diagnostics." if hardware else LOOK)
