"""The rule that shows a person how the run is doing, at the terminal and by `opt-train status`."""

from opt_train.run.state import Stage
from opt_train.supervisor.effects import Show
from opt_train.supervisor.rules import preflights
from opt_train.supervisor.rules.checkpoints import saves_in_flight
from opt_train.supervisor.rules.context import Context, Decision

SHOW_SECONDS = 0.5
"""Between two updates of what a person sees."""
MOST_NAMED = 4
"""Of the nodes that are waited for: a line is no list of a thousand."""


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
        waiting_for=waiting_for(s),
    )
    return [] if now == s.view.shown else [now]


def waiting_for(s: Context) -> str:
    """What the run waits for before it goes on; empty: it trains, or is at rest."""
    live = s.state.live
    match s.state.stage:
        case Stage.ASSEMBLING | Stage.RECOVERING:
            return _before_an_attempt(s)
        case Stage.STARTING | Stage.TRAINING if live is not None and live.leader != s.state.leader:
            away = [n for n in live.nodes if not s.view.node(n).connected]
            return f"ranks that an earlier supervisor left{_on(away)}"
        case Stage.STARTING:
            return "the first step"
        case Stage.TRAINING if s.state.outstanding_orders:
            return f"the ranks to obey order {s.state.outstanding_orders[0].number}"
        case Stage.STOPPING if live is not None:
            return "the ranks to save and leave"
        case Stage.FAILING | Stage.REPLACING if live is not None:
            left = [n for n in live.nodes if not s.is_gone(n, live.generation)]
            if left:
                return f"every rank to end{_on(left)}"
            return "saves under way" if saves_in_flight(s) else "what the ranks' ends still show"
    return ""


def _before_an_attempt(s: Context) -> str:
    places = s.places()
    away = [n for n in places if not s.view.node(n).connected]
    if away:
        joined = len(places) - len(away)
        return f"agents that have not dialed in: {joined} of {len(places)} have{_on(away)}"
    if cold := [n for n in places if not s.is_warm(n)]:
        return f"ranks to warm up{_on(cold)}"
    if tested := [n for n in places if preflights.is_awaited(s, n)]:
        return f"the preflight{_on(tested)}"
    wanted = s.state.newest_good()
    return f"{wanted.path} to be checked" if wanted is not None else ""


def _on(nodes: list[str]) -> str:
    """`` on n1, n2``, and how many more; empty for none."""
    if not nodes:
        return ""
    more = f" and {len(nodes) - MOST_NAMED} more" if len(nodes) > MOST_NAMED else ""
    return f" on {', '.join(nodes[:MOST_NAMED])}{more}"
