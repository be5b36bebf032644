"""Rules of preflights: nodes that train nothing are tested, so that what is broken is known before
it is needed.

Agents test (`burn_in`), and publish what is wrong as findings: from there on it is findings.py's,
which takes an unfit node out. Here is only who is asked when. Nobody waits for a test but the first
attempt of a supervisor's life, and that only where `burn_in.before_run` says so: an agent whose
ranks are to begin ends its test at once.
"""

from opt_train.protocol.commands import Preflight
from opt_train.run.state import Stage
from opt_train.supervisor.effects import Send
from opt_train.supervisor.node_view import NEVER, NodeView
from opt_train.supervisor.rules.context import Context, Decision

SPARE_SECONDS = 30.0
"""Beside `burn_in.seconds`, for an answer to come; then the run begins without it."""


def ask(s: Context) -> list[Decision]:
    """Have every node tested that is due, and on which nothing trains."""
    # Once a second, not at each of the many inputs: nothing here is urgent.
    config = s.config.burn_in
    wanted = config.before_run or config.on_arrival or config.every_seconds
    if not wanted or not s.view.watching:
        return []
    places = s.places()
    training = s.state.live.nodes if s.state.live is not None else ()
    return [
        Send(node, Preflight())
        for node in s.nodes
        if node not in training
        and not s.state.has_failed(node)
        and _is_due(s, s.view.node(node), node in places)
    ]


def _is_due(s: Context, view: NodeView, is_place: bool) -> bool:
    config = s.config.burn_in
    if not view.connected or not view.caught_up or view.preflight_asked > view.preflight_ended:
        return False
    # A new agent is a new node: it may have been repaired, or have come out of a reboot worse.
    is_new = view.preflight_ended == NEVER
    if is_place:
        return is_new and config.before_run and s.state.stage is Stage.ASSEMBLING
    if is_new and (config.on_arrival or config.before_run):
        return True
    tested = view.connected_at if is_new else view.preflight_ended
    return 0.0 < config.every_seconds <= s.view.age(tested)


def is_awaited(s: Context, node: str) -> bool:
    """Whether the attempt that is to begin waits for the tests of `node`."""
    # Not when recovering: those that are to go on were tested when they came, and each second is
    # one of downtime.
    if not s.config.burn_in.before_run or s.state.stage is not Stage.ASSEMBLING:
        return False
    view = s.view.node(node)
    patience = s.config.burn_in.seconds + SPARE_SECONDS
    return view.preflight_ended == NEVER and s.view.age(s.view.stage_since) < patience
