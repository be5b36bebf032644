"""Rules of return: a node that is out may stand by again once it has passed a preflight
(invariant 8).

Most nodes that go down are booted again and well; what they failed of may have been a network, a
hang, a reboot. Such a node is *on trial* when `burn_in.return_seconds` have passed: an agent is
started on it and asked to test it, and nothing else. If the tests pass, `node_returned` makes it a
buffer node; if not, or if nobody answers, its agent leaves, and it is tried again after as long. A
node whose hardware was shown to be bad, or that was out twice, is not tried: its ticket is an
admin's to close.
"""

from opt_logbook.record.node_events import NodeReturned

from opt_train.diagnosis.causes import Cause
from opt_train.protocol.commands import Preflight
from opt_train.protocol.facts import PreflightEnded
from opt_train.run.state import TERMINAL
from opt_train.supervisor.effects import Send, StartAgent
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.leash import may_act, withhold
from opt_train.supervisor.rules.node_fitness import taken_out_by
from opt_train.supervisor.rules.preflights import SPARE_SECONDS

MAY_RETURN = frozenset(
    {
        Cause.NODE_FAILURE,
        Cause.NETWORK,
        Cause.COLLECTIVE_TIMEOUT,
        Cause.HANG,
        Cause.KILLED,
        Cause.UNKNOWN,
    }
)
"""Causes that leave a node in doubt. Not those that show bad hardware, such as an ECC error, nor
`straggler`, which no short test acquits, nor what an admin wants a node back for."""
FAILURES_MAX = 1
"""Of a node that may return: out twice, it stays out."""
START_SECONDS = 60.0
"""For the agent of a node on trial to dial in."""


def may_return(s: Context, node: str) -> bool:
    """Whether a preflight could bring `node` back in this run, now that it is one of its nodes."""
    return node in s.view.members and _is_in_doubt(s, node) and not s.view.node(node).draining


def may_be_asked_for(s: Context, node: str) -> bool:
    """Whether a node that is out, and that the scheduler may have taken from the run, would be
    tested if it came back."""
    return _is_in_doubt(s, node) and _has_paused(s, node)


def _is_in_doubt(s: Context, node: str) -> bool:
    # A finding that took it out is as good as a failed test, and does not pass away.
    known = s.state.nodes[node]
    return (
        s.config.burn_in.return_seconds > 0
        and known.role == "failed"
        and known.failures <= FAILURES_MAX
        and known.cause in MAY_RETURN
        and taken_out_by(s.state, node) is None
    )


def _has_paused(s: Context, node: str) -> bool:
    return s.view.now.wall - s.state.nodes[node].failed_at >= s.config.burn_in.return_seconds


def is_on_trial(s: Context, node: str) -> bool:
    """Whether the node's agent is there to test it, and has neither failed nor taken too long."""
    if not s.state.has_failed(node) or not may_return(s, node):
        return False
    began = _trial_began(s, node)
    if began is None:
        return False
    if s.view.node(node).preflight_ended >= began:
        return _has_passed(s, node) is not None
    return s.view.age(began) < _patience(s)


def _patience(s: Context) -> float:
    return START_SECONDS + s.config.burn_in.seconds + SPARE_SECONDS


def _trial_began(s: Context, node: str) -> float | None:
    """When, by the monotonic clock, this supervisor asked for an agent there since it failed."""
    asked = s.view.node(node).agent_asked
    if asked is None or asked.wall < s.state.nodes[node].failed_at:
        return None
    return asked.monotonic


def _has_passed(s: Context, node: str) -> PreflightEnded | None:
    """What the node on trial has passed; None: it has not, or not yet."""
    view, began = s.view.node(node), _trial_began(s, node)
    result = view.preflight_result
    if began is None or view.preflight_ended < began or result is None:
        return None
    # Where nothing is tested nothing is shown.
    return result if result.tests > 0 and not result.failed and not result.why else None


def begin_trial(s: Context) -> list[Decision]:
    """Start an agent on each node that is due."""
    if not s.config.burn_in.return_seconds or not s.view.watching:
        return []
    if s.state.stage in TERMINAL or s.state.stop_wanted is not None:
        return []
    due = [node for node in s.state.nodes if _is_due(s, node)]
    if due and not may_act(s):
        sentence = f"test {', '.join(due)}, and have what passes stand by again"
        return withhold(s, "return", tuple(due), sentence)
    return [StartAgent(node) for node in due]


def _is_due(s: Context, node: str) -> bool:
    if not s.state.has_failed(node) or not may_return(s, node):
        return False
    pause = s.config.burn_in.return_seconds
    # An agent that is connected is an old one, on its way out.
    if s.view.node(node).connected or (s.state.live is not None and node in s.state.live.nodes):
        return False
    began = _trial_began(s, node)
    if began is not None:
        # Not `_patience`: it is not connected, so this trial is over, or never was one. Where it
        # only lost its link there is an agent already, and no other is started beside it.
        return s.view.age(began) >= max(pause, START_SECONDS)
    return _has_paused(s, node)


def test(s: Context) -> list[Decision]:
    """Have each agent on trial test its node, once nothing runs there."""
    return [
        Send(node, Preflight())
        for node in _on_trial(s)
        if (view := s.view.node(node)).connected
        and view.caught_up
        and not view.running
        and view.preflight_asked < max(view.connected_at, _trial_began(s, node) or 0.0)
        and _has_passed(s, node) is None
    ]


def take_back(s: Context) -> list[Decision]:
    """A node that was out has passed: it stands by."""
    return [
        Record(NodeReturned(node, passed.tests, passed.seconds))
        for node in _on_trial(s)
        # `findings.note` is looked through before: what the tests found is in the journal.
        if s.view.node(node).connected and (passed := _has_passed(s, node)) is not None
    ]


def _on_trial(s: Context) -> list[str]:
    if not s.config.burn_in.return_seconds or not s.view.watching:
        return []
    return [node for node in s.state.nodes if is_on_trial(s, node)]
