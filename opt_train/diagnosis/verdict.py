"""From what was observed of a failed generation to its root cause. Pure: a `Case` in, a `Diagnosis`
out.

The root cause, not the loudest line. When one rank dies, all others lose a peer, and each of them
says so at length; seven watchdogs that fired are victims of the one rank that ran out of memory. So
every rank, every node and the first sign itself give at most one `Suspect`, each suspect has a
`Precedence`, and the lowest wins:

    a probe's finding of bad hardware  the node's agent looked at the instrument itself
    a line that shows bad hardware     whoever says it, a rank that was killed on command too
    a node that is down                explains all of its peers' complaints
    a line of another root cause       only from a rank that ended by itself
    what a rank gave as its reason     only together with the exit code that belongs to it
    how a process ended                SIGKILL from outside, a crash, absence
    silence and hangs                  as the supervisor saw them
    a victim's complaint               a lost peer, a collective that timed out
    the first sign                     when nothing says more

An exit code is believed only together with the rank's last fact: Python itself exits 2 for a
missing file, and anything may exit 78.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from opt_logbook.record.events import Evidence, FailureSeen, FindingNoted, IncidentDiagnosed

from opt_train.diagnosis.causes import LABELS, Blame, Cause, blame_of, cause_named
from opt_train.diagnosis.patterns import EXCEPTION, FRAME, ROOTS, VICTIMS, Indication, Pattern
from opt_train.host.signals import signal_name
from opt_train.protocol.exits import RANK_BAD_CONFIG, RANK_UNSTABLE
from opt_train.protocol.facts import ExitNotice, LogLine, RankExited, Stacks

SIGKILL = 9
MOST_EVIDENCE = 6


class Precedence(IntEnum):
    """Which of several suspects is the root: the smallest. Lines of `ROOTS` take the numbers from
    `HARDWARE_LINE` or `ROOT_LINE` on, in the table's order."""

    HARDWARE_FINDING = -1
    HARDWARE_LINE = 0
    # The gaps take the rows of `ROOTS`: those of hardware from 0 on, all others from 200 on.
    NODE_DOWN = 100
    OTHER_FINDING = 199
    ROOT_LINE = 200
    GIVEN_REASON = 300
    USER_CODE = 301
    UNSTABLE = 302
    CRASHED = 303
    KILLED = 304
    ABSENT = 305
    OUT_OF_REACH = 306
    STOPPED_MOVING = 307
    VICTIM = 308
    NOTHING = 309


@dataclass(frozen=True, slots=True)
class Case:
    """All that is known of a failed generation."""

    seen: FailureSeen
    """The first sign of it."""
    exits: Mapping[int, tuple[str, RankExited]]
    """Rank -> node, how it ended."""
    exit_notices: Mapping[int, ExitNotice]
    """Rank -> its last fact."""
    stacks: Mapping[int, tuple[str, Stacks]]
    down: Mapping[str, str]
    """Nodes of the generation that the cluster calls down, with its reason."""
    fenced: tuple[str, ...] = ()
    """Nodes that did not answer and were fenced before the cluster had called them down."""
    findings: tuple[FindingNoted, ...] = ()
    """What probes found of the generation's nodes that would have ended it by itself."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The root cause as far as the evidence goes."""

    cause: Cause
    blame: Blame
    detail: str
    confidence: float
    node: str
    rank: int
    """-1 where no single rank is to be named."""
    evidence: tuple[Evidence, ...]

    def as_event(self, incident: int, action: str) -> IncidentDiagnosed:
        """The journal's line of it. `action` is one sentence: what will be done about it."""
        return IncidentDiagnosed(
            incident=incident,
            cause=self.cause,
            blame=self.blame,
            detail=self.detail,
            confidence=self.confidence,
            node=self.node,
            rank=self.rank,
            evidence=self.evidence,
            action=action,
        )


@dataclass(frozen=True, slots=True)
class Suspect:
    """What one rank, one node or the first sign points to."""

    precedence: int
    indication: Indication
    node: str
    rank: int
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, slots=True)
class _LogReading:
    """The most telling line of a log's end."""

    precedence: int
    indication: Indication
    evidence: tuple[Evidence, ...]


def diagnose(case: Case) -> Diagnosis:
    """Name the root cause of `case`."""
    found = [_node_found(event) for event in case.findings]
    suspects = [*found, *_nodes_lost(case), *_ranks_ended(case), _first_sign(case)]
    # Among equals the one that showed itself first, then the lowest rank: the same case always
    # reads the same.
    seen = case.seen
    first_seen = (seen.node, seen.rank)
    suspects.sort(
        key=lambda s: (s.precedence, (s.node, s.rank) != first_seen, s.node != seen.node, s.rank)
    )
    root = suspects[0]
    others = [e for s in suspects[1:] if s.precedence == Precedence.VICTIM for e in s.evidence]
    evidence = tuple(dict.fromkeys((*root.evidence, *others)))[:MOST_EVIDENCE]
    cause = root.indication.cause
    # Whichever rank happened to read a bad file is its witness; the evidence names it.
    is_of_nobody = cause == Cause.CORRUPT_CHECKPOINT
    return Diagnosis(
        cause=cause,
        blame=blame_of(cause),
        detail=root.indication.detail,
        confidence=root.indication.confidence,
        node="" if is_of_nobody else root.node,
        rank=-1 if is_of_nobody else root.rank,
        evidence=evidence,
    )


# Nodes --------------------------------------------------------------------------------------------


def _node_found(event: FindingNoted) -> Suspect:
    precedence = Precedence.OTHER_FINDING
    if event.blame == Blame.HARDWARE:
        precedence = Precedence.HARDWARE_FINDING
    indication = Indication(cause_named(event.cause), event.detail, event.confidence)
    evidence = event.evidence or (_observed(f"a probe of {event.node} found {event.cause}"),)
    return Suspect(precedence, indication, event.node, -1, evidence)


def _nodes_lost(case: Case) -> list[Suspect]:
    down = [_node_down(node, reason) for node, reason in case.down.items()]
    return [*down, *(_node_fenced(node) for node in case.fenced)]


def _node_down(node: str, reason: str) -> Suspect:
    return Suspect(
        Precedence.NODE_DOWN,
        Indication(Cause.NODE_FAILURE, reason or "the cluster says it is down", 0.95),
        node,
        -1,
        (_observed(f"cluster: {node} is down: {reason or 'no reason given'}"),),
    )


def _node_fenced(node: str) -> Suspect:
    # Down by our own hand: less telling than any process that says how it ended.
    return Suspect(
        Precedence.OUT_OF_REACH,
        Indication(Cause.NODE_FAILURE, "it did not answer any more and was fenced", 0.7),
        node,
        -1,
        (
            _observed(
                f"{node} did not answer, and was fenced before the cluster had called it down"
            ),
        ),
    )


# Ranks --------------------------------------------------------------------------------------------


def _ranks_ended(case: Case) -> list[Suspect]:
    found = [
        _rank_ended(node, exited, case.exit_notices.get(rank))
        for rank, (node, exited) in case.exits.items()
    ]
    return [suspect for suspect in found if suspect is not None]


def _rank_ended(node: str, exited: RankExited, last_fact: ExitNotice | None) -> Suspect | None:
    """What the end of one rank shows; None: nothing of its own."""
    rank, notice = exited.rank, exited.leaving or last_fact
    reading = _read_log(exited.log_tail)
    # Bad hardware is believed whoever shows it. Ranks die together, so the one on the sick GPU may
    # have been killed on command like its peers.
    if reading is not None and reading.precedence < Precedence.NODE_DOWN:
        return _by_log(node, rank, reading)
    if (
        notice is not None
        and notice.cause == Cause.CORRUPT_CHECKPOINT
        and notice.code == exited.code
    ):
        # Its log has the same sentence, with whatever words the file system has put into it: they
        # say how it found the checkpoint bad, and not what else has happened.
        return _given_reason(node, exited, notice)
    # On gloo a survivor complains at once, on NCCL it spins until it is killed: that it wrote
    # nothing does not make it the one that stopped.
    if exited.killed_by_agent:
        # It was alive until it was killed: what its log complains of did not end it.
        if reading is None or reading.precedence != Precedence.VICTIM:
            return None
        return _by_log(node, rank, reading)
    if reading is not None and reading.precedence < Precedence.GIVEN_REASON:
        return _by_log(node, rank, reading)
    given = _given_reason(node, exited, notice)
    if given is not None:
        return given
    if reading is not None:
        return _by_log(node, rank, reading)
    # The kernel's own killer would have left its line, which `ROOTS` reads first. Where a user may
    # not read the kernel log this is all there is.
    if exited.signal == SIGKILL:
        text = (
            f"rank {rank} (pid {exited.pid}) was ended by SIGKILL; no agent sent it and no log "
            "says why"
        )
        return Suspect(
            Precedence.KILLED,
            Indication(Cause.KILLED, "SIGKILL from outside", 0.8),
            node,
            rank,
            (_observed(text),),
        )
    announced = notice is not None and notice.code == exited.code
    # It was done, or left as it had announced, perhaps because a peer was gone: no suspect.
    if exited.code == 0 or (announced and exited.code is not None):
        return None
    return _crashed(node, exited)


def _given_reason(node: str, exited: RankExited, notice: ExitNotice | None) -> Suspect | None:
    """The reason that the rank itself gave for its end, where it may be believed."""
    if notice is None:
        return None
    evidence = (_last_fact(exited.rank, notice),)
    announced = notice.code == exited.code
    if notice.cause in LABELS:
        # A rank that was asked to stop, or stops itself on purpose, knows the cause.
        indication = Indication(Cause(notice.cause), notice.reason, 0.95)
        return Suspect(Precedence.GIVEN_REASON, indication, node, exited.rank, evidence)
    if announced and exited.code == RANK_BAD_CONFIG:
        indication = Indication(Cause.CONFIG, notice.reason, 0.95)
        return Suspect(Precedence.GIVEN_REASON, indication, node, exited.rank, evidence)
    if announced and exited.code == RANK_UNSTABLE:
        indication = Indication(Cause.LOSS_NAN, notice.reason, 0.8)
        return Suspect(Precedence.UNSTABLE, indication, node, exited.rank, evidence)
    return None


def _crashed(node: str, exited: RankExited) -> Suspect:
    how = f"exit code {exited.code}"
    if exited.signal is not None:
        how = signal_name(exited.signal)
    phase = exited.phase or "unknown"
    ended = _observed(f"rank {exited.rank} (pid {exited.pid}) ended with {how} in phase {phase}")
    tail = tuple(_evidence(line) for line in exited.log_tail[-2:])
    indication = Indication(Cause.UNKNOWN, f"ended with {how}", 0.3)
    return Suspect(Precedence.CRASHED, indication, node, exited.rank, (ended, *tail))


# Logs ---------------------------------------------------------------------------------------------


def _by_log(node: str, rank: int, reading: _LogReading) -> Suspect:
    return Suspect(reading.precedence, reading.indication, node, rank, reading.evidence)


def _read_log(tail: tuple[LogLine, ...]) -> _LogReading | None:
    """A root cause, a victim's complaint, or a Python error of the rank's own, in this order; None:
    the lines show nothing."""
    for place, pattern in enumerate(ROOTS):
        lines = _matching(pattern, tail)
        if lines:
            first = Precedence.ROOT_LINE
            if blame_of(pattern.indication.cause) == Blame.HARDWARE:
                first = Precedence.HARDWARE_LINE
            evidence = tuple(_evidence(line) for line in lines[:2])
            return _LogReading(first + place, pattern.indication, evidence)
    # Before the traceback: a lost peer ends in a Python exception as well, and would be taken for
    # the user's own.
    for pattern in VICTIMS:
        lines = _matching(pattern, tail)
        if lines:
            return _LogReading(Precedence.VICTIM, pattern.indication, (_evidence(lines[-1]),))
    return _read_traceback(tail)


def _matching(pattern: Pattern, tail: tuple[LogLine, ...]) -> list[LogLine]:
    return [line for line in tail if pattern.expression.search(line.text)]


def _read_traceback(tail: tuple[LogLine, ...]) -> _LogReading | None:
    frames = [place for place, line in enumerate(tail) if FRAME.search(line.text)]
    if not frames:
        return None
    # Of chained exceptions the last one ended the process.
    raised = [
        (line, match[1]) for line in tail[frames[-1] :] if (match := EXCEPTION.match(line.text))
    ]
    if not raised:
        return None
    line, name = raised[0]
    indication = Indication(Cause.USER_CODE, name, 0.85)
    return _LogReading(Precedence.USER_CODE, indication, (_evidence(line),))


# The first sign -----------------------------------------------------------------------------------

FIRST_SIGNS: Mapping[str, tuple[int, Indication]] = {
    # Ahead of all but a finding: whatever else these ranks complain of, their values are wrong.
    "in_force": (
        0,
        Indication(Cause.CONFIG, "what is in force is not what the configuration says", 0.99),
    ),
    "takeover": (
        Precedence.NOTHING,
        Indication(
            Cause.NONE,
            "their supervisor was lost at their start, or its configuration changed",
            0.9,
        ),
    ),
    "silence": (
        Precedence.STOPPED_MOVING,
        Indication(Cause.NODE_FAILURE, "no word from the node, and nothing moves", 0.6),
    ),
    "unsaved": (
        Precedence.NOTHING,
        Indication(Cause.STORAGE, "the last checkpoint could not be committed", 0.8),
    ),
    "missing": (
        Precedence.ABSENT,
        Indication(Cause.KILLED, "the rank is gone and nobody saw how", 0.4),
    ),
}
"""Sign -> what it points to by itself. A hang is read from the stacks."""
NO_SIGN = (Precedence.NOTHING, Indication(Cause.UNKNOWN, "the evidence does not say", 0.1))


def _first_sign(case: Case) -> Suspect:
    """What the first sign by itself says, for when no process and no log says more."""
    seen = case.seen
    evidence = (_observed(seen.what),)
    if seen.sign == "hang":
        return _hang(case, evidence)
    precedence, indication = FIRST_SIGNS.get(seen.sign, NO_SIGN)
    return Suspect(precedence, indication, seen.node, seen.rank, evidence)


def _hang(case: Case, seen: tuple[Evidence, ...]) -> Suspect:
    detail = "stopped moving"
    ended = case.exits.get(case.seen.rank)
    if ended is not None and ended[1].phase:
        detail += f" in phase {ended[1].phase}"
    stack = case.stacks.get(case.seen.rank)
    if stack is not None:
        seen += tuple(_evidence(line) for line in stack[1].tail[-3:])
        if stack[1].process_state == "T":
            detail += "; its process was stopped"
    indication = Indication(Cause.HANG, detail, 0.8)
    return Suspect(Precedence.STOPPED_MOVING, indication, case.seen.node, case.seen.rank, seen)


# Evidence -----------------------------------------------------------------------------------------


def _observed(text: str) -> Evidence:
    """What the supervisor itself observed: in no file."""
    return Evidence("", 0, text)


def _last_fact(rank: int, notice: ExitNotice) -> Evidence:
    return _observed(
        f"last fact of rank {rank}: code {notice.code} at step {notice.step}: {notice.reason}"
    )


def _evidence(line: LogLine) -> Evidence:
    return Evidence(line.file, line.line, line.text)
