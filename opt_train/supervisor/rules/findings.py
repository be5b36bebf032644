"""Rules of findings: what a probe reports of a node, from the fact to what is done about it.

A probe publishes a `NodeFinding`; the agent keeps it until it is acknowledged. `note` journals it
once, with the response of the table (responses.py), before it is acknowledged; all that follows
goes by the journal's line. `detect_finding` makes an incident of what cannot wait: diagnosis,
budget and replacement are then those of any failure. What can wait is a planned replacement: when a
checkpoint has been committed since and a buffer node is warm, `begin_replacement` ends the ranks,
the attempt ends as `replaced`, and the run assembles again without the node. `take_out_unfit_*` is
the door of all that stand by or assemble.
"""

from dataclasses import asdict, replace

from opt_logbook.record.events import (
    AttemptEnded,
    Evidence,
    FindingNoted,
    NodeFailed,
)
from opt_logbook.record.hardware import GpuIdentity
from opt_logbook.record.node_events import ReplacementBegan

from opt_train.diagnosis.causes import DRAIN, Cause, blame_of
from opt_train.protocol.facts import LogLine, NodeFinding
from opt_train.run.state import REPLACED, ROLLED_BACK, RunState
from opt_train.supervisor.rules.attempts import report_dropped
from opt_train.supervisor.rules.checkpoints import abandon_unfinished, saves_in_flight
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.failures import failure
from opt_train.supervisor.rules.node_fitness import (
    due_for_replacement,
    interrupting,
    is_unfit,
    is_unusable,
    taken_out_by,
)
from opt_train.supervisor.rules.responses import finding_sentence, response_to_finding


def note(s: Context) -> list[Decision]:
    """Journal each finding that is news. First among the rules: what is acknowledged is noted."""
    for node in sorted(s.view.to_settle & s.view.pending):
        if node not in s.view.members:
            continue
        for fact in s.view.node(node).facts.values():
            if isinstance(fact, NodeFinding):
                noted = finding_noted(s, node, fact)
                # One at a time: two equal findings in the queue of a node are one line, since the
                # second look finds the first in the journal.
                if not is_known(s.state, noted):
                    return [_record(s, noted)]
    return []


def note_drain(s: Context) -> list[Decision]:
    """Journal each node that an admin wants back: a finding of the cluster's own."""
    for node in s.nodes if s.view.draining else ():
        if not s.view.node(node).draining or s.state.has_failed(node):
            continue
        evidence = (LogLine("cluster", 0, f"drained: {s.view.node(node).draining}"),)
        drained = NodeFinding(Cause.PREEMPTION, DRAIN, permanent=True, confidence=1.0)
        noted = finding_noted(s, node, replace(drained, evidence=evidence))
        if not is_known(s.state, noted):
            return [_record(s, noted)]
    return []


def _record(s: Context, noted: FindingNoted) -> Record:
    return Record(noted, step=s.step if s.state.attempt is not None else None)


def finding_noted(s: Context, node: str, finding: NodeFinding) -> FindingNoted:
    """The line that journals `finding` about `node`, with what will be done about it."""
    response = response_to_finding(
        finding.cause, finding.detail, s.config.supervisor, permanent=finding.permanent
    )
    return FindingNoted(
        node=node,
        cause=finding.cause,
        blame=blame_of(finding.cause),
        detail=finding.detail,
        permanent=finding.permanent,
        confidence=finding.confidence,
        evidence=tuple(Evidence(line.file, line.line, line.text) for line in finding.evidence),
        action=response.action,
        mode=response.mode,
        response=finding_sentence(node, response),
        gpu=GpuIdentity(**asdict(finding.gpu)) if finding.gpu is not None else None,
    )


def is_known(state: RunState, event: FindingNoted) -> bool:
    """Whether the journal has it already: a probe that looks every few seconds publishes a
    condition as often, and it is one line. What has passed may happen again in another attempt."""
    current = state.attempt.name if state.attempt is not None else ""
    return any(
        _key(known.event) == _key(event) and (event.permanent or known.attempt == current)
        for known in state.findings
    )


def _key(event: FindingNoted) -> tuple[object, ...]:
    # With action and mode: a person who lets go of the leash sees it noted, and answered, again.
    return (event.node, event.cause, event.detail, event.permanent, event.action, event.mode)


# What cannot wait ---------------------------------------------------------------------------------


def detect_finding(s: Context) -> list[Decision]:
    """A node that trains was found in a state that ends the attempt, though no rank has failed."""
    for node in s.attempt.nodes if s.state.findings else ():
        for finding in interrupting(s.state, node):
            event = finding.event
            detail = f" ({event.detail})" if event.detail else ""
            seen = f": {event.evidence[0].text}" if event.evidence else ""
            what = f"a probe of {node} found {event.cause}{detail}{seen}"
            return failure(s, node, -1, what, "finding")
    return []


# What can wait ------------------------------------------------------------------------------------


def begin_replacement(s: Context) -> list[Decision]:
    """A node that trains is to be replaced, its work is in a checkpoint, and a buffer node is warm:
    the ranks are ended."""
    attempt = s.attempt
    leaving = s.generation.exits
    if not s.state.findings or not attempt.began or leaving or s.step >= s.config.train.steps:
        return []  # ranks that are at their end anyway are let go
    for node in attempt.nodes:
        finding = due_for_replacement(s.state, node)
        if finding is not None and s.ready_buffers():
            event = finding.event
            began = ReplacementBegan(attempt.generation, node, event.cause, event.detail)
            return [Record(began, step=s.step)]
    return []


def end_replaced(s: Context) -> list[Decision]:
    """The ranks are gone. A manifest that is being written is waited for, it may be the newest."""
    if not s.attempt.killed or saves_in_flight(s):
        return []
    outcome, why = REPLACED, "a node was replaced or added before it was complete"
    if s.state.rollback is not None:
        outcome, why = ROLLED_BACK, "it lies beyond the step that is gone back to"
    return [
        *abandon_unfinished(s, why),
        *report_dropped(s),
        Record(AttemptEnded(s.attempt.generation, outcome), step=s.step),
    ]


# The doors ----------------------------------------------------------------------------------------


def take_out_unfit_buffers(s: Context) -> list[Decision]:
    """A node that stands by and is unfit is out: it takes nobody's place."""
    if not s.state.findings:
        return []
    places = set(s.places())
    training = s.state.live.nodes if s.state.live is not None else ()
    return [
        _out(s, node)
        for node in s.nodes
        if node not in places
        and node not in training
        and is_unfit(s.state, node)
        and not s.state.has_failed(node)
    ]


def take_out_unfit_places(s: Context) -> list[Decision]:
    """While nothing trains: a node that should train and is unfit is out.

    One that could wait for a checkpoint, or for the next attempt, is out only if there is a buffer
    node for it: it still trains, and a run that stands still until a person comes is worse.
    """
    if not s.state.findings:
        return []
    places = s.places()
    vacant = sum(s.state.has_failed(node) for node in places)
    connected = [node for node in s.buffer_nodes() if s.view.node(node).connected]
    for node in places:
        if s.state.has_failed(node) or not is_unfit(s.state, node):
            continue
        if is_unusable(s.state, node) or len(connected) > vacant:
            return [_out(s, node)]
    return []


def _out(s: Context, node: str) -> Record:
    finding = taken_out_by(s.state, node)
    assert finding is not None, f"{node} is fit"
    return Record(NodeFailed(node, incident=0, cause=finding.event.cause))
