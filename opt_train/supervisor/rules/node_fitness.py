"""Whether a node is fit to train: one question, which every door asks.

A node comes to train by three doors: the run assembles, a buffer node is promoted, a node that
trains is replaced. A node is unfit when it has failed, for the rest of the run (invariant 8), or
when a probe's finding calls for taking it out. The second is folded from `finding_noted`, whose
action and mode were written down with it: a supervisor's death acquits no node, nor does a newer
table of responses.
"""

from collections.abc import Iterator

from opt_train.run.finding import NotedFinding
from opt_train.run.state import RunState
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules.responses import AT_LEISURE, Action

TAKES_OUT = AT_LEISURE | {Action.REPLACE_NOW}
INTERRUPTS = frozenset({Action.RESTART, Action.REPLACE_NOW, Action.HALT})
"""Actions that end the ranks although none of them has failed."""


def is_unfit(state: RunState, node: str) -> bool:
    """Whether no attempt should begin with `node`."""
    return state.has_failed(node) or taken_out_by(state, node) is not None


def is_unusable(state: RunState, node: str) -> bool:
    """Whether no attempt may begin with `node`, though there be no other to take its place."""
    finding = taken_out_by(state, node)
    now = finding is not None and finding.event.action == Action.REPLACE_NOW
    return state.has_failed(node) or now


def taken_out_by(state: RunState, node: str) -> NotedFinding | None:
    """The gravest finding that makes `node` unfit, the oldest of its action; None: none does."""
    found = [f for f in _acted_on(state, node) if f.event.action in TAKES_OUT]
    at_once = [f for f in found if f.event.action == Action.REPLACE_NOW]
    return next(iter((*at_once, *found)), None)


def due_for_replacement(state: RunState, node: str) -> NotedFinding | None:
    """The finding for which `node` is to be replaced now that a checkpoint is committed; None:
    there is none, or no checkpoint yet."""
    for finding in _acted_on(state, node):
        if finding.event.action == Action.REPLACE_AT_CHECKPOINT and finding.saved_since:
            return finding
    return None


def interrupting(state: RunState, node: str) -> Iterator[NotedFinding]:
    """Findings on `node` of the current attempt for which its ranks are ended."""
    current = state.attempt.name if state.attempt is not None else ""
    for finding in _acted_on(state, node):
        # One of an older attempt was answered by its end.
        if finding.attempt == current and finding.event.action in INTERRUPTS:
            yield finding


def _acted_on(state: RunState, node: str) -> Iterator[NotedFinding]:
    return (f for f in state.findings if f.event.node == node and f.event.mode == Mode.ACT)
