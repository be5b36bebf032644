"""From what was seen of an incident to its root cause. Pure: a `Case` in, a `Diagnosis` out.

The root cause, not the loudest line: ranks that were killed on command, or say that a peer's
connection broke, are victims; a cause is looked for among the others first. An exit code is
believed only together with the rank's last fact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from opt_logbook.record.events import Evidence

from opt_train.diagnosis.causes import BY_LABEL, Finding, blame_of
from opt_train.diagnosis.patterns import EXCEPTION, FRAME, ROOTS, VICTIMS
from opt_train.protocol.exits import RANK_BAD_CONFIG, RANK_UNSTABLE
from opt_train.protocol.facts import ExitNotice, LogLine, RankExited, Stacks

SIGKILL = 9
SIGNAL_NAMES = {
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    15: "SIGTERM",
}
MOST_EVIDENCE = 6


@dataclass(frozen=True, slots=True)
class Case:
    """All that is known of a failed generation."""

    sign: str
    """How the failure showed itself first (`FailureSeen.sign`)."""
    what: str
    node: str
    rank: int
    exits: Mapping[int, tuple[str, RankExited]]
    """Rank -> node, how it ended."""
    leavings: Mapping[int, ExitNotice]
    stacks: Mapping[int, tuple[str, Stacks]]
    down: Mapping[str, str]
    """Nodes of the generation that the cluster calls down, with its reason."""
    fenced: tuple[str, ...] = ()
    """Nodes that did not answer and were fenced before the cluster had called them down."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The root cause as far as the evidence goes. `action` is the response's to say."""

    cause: str
    blame: str
    detail: str
    confidence: float
    node: str
    rank: int
    evidence: tuple[Evidence, ...]
    action: str = ""


@dataclass(frozen=True, slots=True)
class Suspect:
    """What one rank, or one node, has to say. Smaller `order` is more telling."""

    order: int
    finding: Finding
    node: str
    rank: int
    evidence: tuple[Evidence, ...]


HARDWARE_LINE, NODE_DOWN, ROOT_LINE = 0, 100, 200
(
    CONFESSED,
    USER_CODE,
    UNSTABLE,
    CRASHED,
    KILLED,
    ABSENT,
    OUT_OF_REACH,
    STOPPED_MOVING,
    VICTIM,
    NOTHING,
) = range(300, 310)
"""Order of suspects. Lines of `ROOTS` stand in the table's order; a node that is down explains all
but bad hardware."""


def diagnose(case: Case) -> Diagnosis:
    """Name the root cause of `case`."""
    suspects = [*_nodes_lost(case), *_ranks_ended(case), *_as_seen(case)]
    # Among equals the one that showed itself first, then the lowest rank: the same case always
    # reads the same.
    first_seen = (case.node, case.rank)
    suspects.sort(
        key=lambda s: (s.order, (s.node, s.rank) != first_seen, s.node != case.node, s.rank)
    )
    root = suspects[0]
    others = [e for s in suspects[1:] if s.order == VICTIM for e in s.evidence]
    evidence = tuple(dict.fromkeys((*root.evidence, *others)))[:MOST_EVIDENCE]
    label = root.finding.label
    return Diagnosis(
        cause=label,
        blame=blame_of(label),
        detail=root.finding.detail,
        confidence=root.finding.confidence,
        node=root.node,
        rank=root.rank,
        evidence=evidence,
    )


def _nodes_lost(case: Case) -> list[Suspect]:
    return [
        Suspect(
            NODE_DOWN,
            Finding("node_failure", reason or "the cluster says it is down", 0.95),
            node,
            -1,
            (Evidence("", 0, f"cluster: {node} is down: {reason or 'no reason given'}"),),
        )
        for node, reason in case.down.items()
    ] + [
        Suspect(
            OUT_OF_REACH,
            Finding("node_failure", "it did not answer any more and was fenced", 0.7),
            node,
            -1,
            (
                Evidence(
                    "",
                    0,
                    f"{node} did not answer, and was fenced before the cluster had called it down",
                ),
            ),
        )
        for node in case.fenced
    ]


def _ranks_ended(case: Case) -> list[Suspect]:
    found = [
        _rank_ended(node, exited, case.leavings.get(rank))
        for rank, (node, exited) in case.exits.items()
    ]
    return [suspect for suspect in found if suspect is not None]


def _rank_ended(node: str, exited: RankExited, told: ExitNotice | None) -> Suspect | None:
    """What the end of one rank shows; None: nothing of its own."""
    rank, leaving = exited.rank, exited.leaving or told
    by_line = _by_line(exited.log_tail)
    if by_line is not None and by_line[0] < NODE_DOWN:
        return Suspect(by_line[0], by_line[1], node, rank, by_line[2])
    if exited.killed_by_agent:
        # It was alive until it was killed: what its log complains of did not end it.
        if by_line is None or by_line[0] != VICTIM:
            return None
        return Suspect(VICTIM, by_line[1], node, rank, by_line[2])
    if by_line is not None and by_line[0] < CONFESSED:
        return Suspect(by_line[0], by_line[1], node, rank, by_line[2])
    if leaving is not None and leaving.cause in BY_LABEL:
        # A rank that was asked to stop, or stops itself on purpose, says why; it must also have
        # left with that code.
        return Suspect(
            CONFESSED,
            Finding(leaving.cause, leaving.reason, 0.95),
            node,
            rank,
            (_last_fact(rank, leaving),),
        )
    believed = leaving is not None and leaving.code == exited.code
    if believed and leaving is not None and exited.code == RANK_BAD_CONFIG:
        return Suspect(
            CONFESSED,
            Finding("config", leaving.reason, 0.95),
            node,
            rank,
            (_last_fact(rank, leaving),),
        )
    if believed and leaving is not None and exited.code == RANK_UNSTABLE:
        return Suspect(
            UNSTABLE,
            Finding("loss_nan", leaving.reason, 0.8),
            node,
            rank,
            (_last_fact(rank, leaving),),
        )
    if by_line is not None:
        return Suspect(*by_line[:2], node, rank, by_line[2])
    if exited.signal == SIGKILL:
        said = (
            f"rank {rank} (pid {exited.pid}) was ended by SIGKILL; no agent sent it and no log "
            "says why"
        )
        return Suspect(
            KILLED,
            Finding("killed", "SIGKILL from outside", 0.8),
            node,
            rank,
            (Evidence("", 0, said),),
        )
    if exited.code == 0 or (believed and exited.code is not None):
        return None
    return _crashed(node, exited)


def _crashed(node: str, exited: RankExited) -> Suspect:
    if exited.signal is not None:
        how = SIGNAL_NAMES.get(exited.signal, f"signal {exited.signal}")
    else:
        how = f"exit code {exited.code}"
    said = Evidence(
        "",
        0,
        f"rank {exited.rank} (pid {exited.pid}) ended with {how} in phase "
        f"{exited.phase or 'unknown'}",
    )
    tail = tuple(_evidence(line) for line in exited.log_tail[-2:])
    return Suspect(
        CRASHED, Finding("unknown", f"ended with {how}", 0.3), node, exited.rank, (said, *tail)
    )


def _by_line(tail: tuple[LogLine, ...]) -> tuple[int, Finding, tuple[Evidence, ...]] | None:
    """The most telling line of a log's end: a root, a Python error of its own, or a victim's
    complaint."""
    for place, pattern in enumerate(ROOTS):
        lines = [line for line in tail if pattern.expression.search(line.text)]
        if lines:
            order = place + (
                HARDWARE_LINE if blame_of(pattern.finding.label) == "hardware" else ROOT_LINE
            )
            return order, pattern.finding, tuple(_evidence(line) for line in lines[:2])
    for pattern in VICTIMS:
        lines = [line for line in tail if pattern.expression.search(line.text)]
        if lines:
            return VICTIM, pattern.finding, (_evidence(lines[-1]),)
    frames = [place for place, line in enumerate(tail) if FRAME.search(line.text)]
    if not frames:
        return None
    raised = [
        (line, match[1]) for line in tail[frames[-1] :] if (match := EXCEPTION.match(line.text))
    ]
    if not raised:
        return None
    line, name = raised[0]
    return USER_CODE, Finding("user_code", name, 0.85), (_evidence(line),)


def _as_seen(case: Case) -> list[Suspect]:
    """What the first sign by itself says, for when no process and no log says more."""
    seen: tuple[Evidence, ...] = (Evidence("", 0, case.what),)
    stack = case.stacks.get(case.rank)
    if case.sign == "hang":
        if stack is not None:
            seen += tuple(_evidence(line) for line in stack[1].tail[-3:])
        stopped = stack is not None and stack[1].process_state == "T"
        ended = case.exits.get(case.rank)
        where = f" in phase {ended[1].phase}" if ended is not None and ended[1].phase else ""
        detail = f"stopped moving{where}" + ("; its process was stopped" if stopped else "")
        return [Suspect(STOPPED_MOVING, Finding("hang", detail, 0.8), case.node, case.rank, seen)]
    label, detail, confidence, order = {
        "in_force": ("config", "what is in force is not what the configuration says", 0.99, 0),
        "takeover": (
            "none",
            "their supervisor was lost at their start, or its configuration changed",
            0.9,
            NOTHING,
        ),
        "silence": (
            "node_failure",
            "no word from the node, and nothing moves",
            0.6,
            STOPPED_MOVING,
        ),
        "unsaved": ("storage", "the last checkpoint could not be committed", 0.8, NOTHING),
        "missing": ("killed", "the rank is gone and nobody saw how", 0.4, ABSENT),
    }.get(case.sign, ("unknown", "the evidence does not say", 0.1, NOTHING))
    return [Suspect(order, Finding(label, detail, confidence), case.node, case.rank, seen)]


def _last_fact(rank: int, leaving: ExitNotice) -> Evidence:
    return Evidence(
        "",
        0,
        f"last fact of rank {rank}: code {leaving.code} at step {leaving.step}: {leaving.reason}",
    )


def _evidence(line: LogLine) -> Evidence:
    return Evidence(line.file, line.line, line.text)
