"""What no cause asks for, and the supervisor would still do by itself: under `supervisor.mode` too
(invariant 14)."""

from opt_logbook.record.node_events import ActionWithheld

from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.responses import in_mode


def may_act(s: Context) -> bool:
    """Whether the supervisor does by itself what answers no cause: it takes in nodes that have
    come, asks for others, passes over repeat offenders."""
    return Mode(s.config.supervisor.mode) is Mode.ACT


def withhold(
    s: Context, action: str, nodes: tuple[str, ...], sentence: str, mode: Mode | None = None
) -> list[Decision]:
    """Journal, once an attempt, what would be done to `nodes` if the mode were `act`; `mode` None:
    that of the supervisor."""
    if (action, nodes) in s.state.withheld:
        return []
    # Every second the rule would say so again.
    mode = mode or Mode(s.config.supervisor.mode)
    withheld = ActionWithheld(action, nodes, mode, in_mode(sentence, mode))
    return [Record(withheld, step=s.step if s.state.attempt is not None else None)]
