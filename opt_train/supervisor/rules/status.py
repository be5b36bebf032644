"""The rule that shows a person at the terminal how the run is doing."""

from opt_train.supervisor.effects import Show
from opt_train.supervisor.rules.context import Context, Decision

SHOW_SECONDS = 0.5
"""Between two updates of what a person sees."""


def show(s: Context) -> list[Decision]:
    """What a person at the terminal sees, when it has changed and not more than twice a second."""
    if s.view.age(s.view.shown_at) < SHOW_SECONDS or s.state.created is None:
        return []
    places = s.state.live.nodes if s.state.live is not None else s.places()
    standing = [
        n for n, r in s.state.nodes.items() if r.role == "buffer" and s.view.node(n).connected
    ]
    now = Show(
        stage=s.state.stage,
        step=s.step,
        steps=s.config.train.steps,
        loss=s.view.training.history.newest_of_attempt("loss"),
        tokens_per_second=s.view.training.history.newest_of_attempt("tokens_per_second"),
        active_nodes=sum(s.view.node(n).connected for n in places),
        buffer_nodes=len(standing),
        attempt=s.state.attempt.name if s.state.attempt else "",
        last_incident=s.state.last_incident,
    )
    return [] if now == s.view.shown else [now]
