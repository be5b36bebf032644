"""What to do now: one table of rules a stage, looked through from the top; the first rule that has
something wins.

`decide` is pure and changes nothing. Each decision, once carried out, changes the state (it was
journalled) or the observation (it was sent), so that the same rule is silent next time: the core
asks until there is nothing left.
"""

from collections.abc import Callable, Mapping

from opt_train.config.run_config import RunConfig
from opt_train.run.state import TERMINAL, RunState
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.effects import Show
from opt_train.supervisor.inputs import Identity
from opt_train.supervisor.rules import attempts as attempt
from opt_train.supervisor.rules import checkpoints as saves
from opt_train.supervisor.rules import failures as failure
from opt_train.supervisor.rules import hangs as watch
from opt_train.supervisor.rules import nodes
from opt_train.supervisor.rules import orders as stop
from opt_train.supervisor.rules import snapshots as held
from opt_train.supervisor.rules.context import Context, Decision, number_in

Rule = Callable[[Context], list[Decision]]

SHOW_SECONDS = 0.5
"""Between two updates of what a person sees."""

HEAR: tuple[Rule, ...] = (saves.conclude, nodes.join)
SAVE: tuple[Rule, ...] = (saves.abandon_failed, saves.commit, held.commit)
HOLD: tuple[Rule, ...] = (held.copy_to_partners, held.pass_on)
LISTEN: tuple[Rule, ...] = (
    failure.see_difference,
    attempt.report_in_force,
    attempt.begin_training,
    attempt.report_validation,
    attempt.close_recovered,
)
SIGNS: tuple[Rule, ...] = (
    failure.detect_rank_exit,
    failure.see_node_down,
    watch.watch_missing,
    watch.watch_hang,
    watch.watch_silence,
)
DIE: tuple[Rule, ...] = (failure.kill, failure.conclude_kill)
KEEP: tuple[Rule, ...] = (nodes.lose_buffers, nodes.evict)

GATHER: tuple[Rule, ...] = (
    stop.rest,
    failure.follow,
    nodes.lose_buffers,
    nodes.fail_unreachable,
    nodes.promote_buffers,
    nodes.evict,
    attempt.verify,
    attempt.start,
)
TAKE_OVER: tuple[Rule, ...] = (
    failure.see_other_lineage,
    failure.detect_rank_exit,
    failure.see_node_down,
    attempt.adopt,
    watch.watch_missing,
    watch.watch_silence,
)
TRAIN: tuple[Rule, ...] = (
    *LISTEN,
    *SAVE,
    *HOLD,
    saves.retire,
    failure.see_unsaved_end,
    attempt.end_by_itself,
    *SIGNS,
    attempt.begin_ranks,
    *KEEP,
)
STOP: tuple[Rule, ...] = (
    stop.hear_obedience,
    *LISTEN,
    *SAVE,
    *HOLD,
    saves.retire,
    failure.see_unsaved_end,
    attempt.end_by_itself,
    stop.withdraw,
)

STAGES: Mapping[str, tuple[Rule, ...]] = {
    "assembling": GATHER,
    "recovering": GATHER,
    "starting": TRAIN,
    "training": TRAIN,
    "taking over": (*SAVE, *TAKE_OVER, *KEEP),
    "stopping": (*STOP, *SIGNS, stop.relay, *KEEP),
    "stopping by force": (*SAVE, *DIE, stop.end_stopped),
    "failing": (*SAVE, *DIE, failure.identify, failure.end_failed),
    "at rest": (stop.rest,),
    "finishing": (attempt.finish,),
}


def decide(
    state: RunState, seen: ClusterView, config: RunConfig, identity: Identity
) -> list[Decision]:
    """The next decisions, in order; none when all is as it should be."""
    situation = Context(state, seen, config, identity)
    for rule in (*HEAR, *STAGES.get(stage_of(situation), ()), *LAST):
        decisions = rule(situation)
        if decisions:
            return decisions
    return []


def stage_of(s: Context) -> str:
    """The state's stage, told apart by who is in charge of its ranks and by what was asked."""
    stage, live = s.state.stage, s.state.live
    if stage == "stopping" and live is None:
        return "at rest"
    if stage == "stopping" and stop.is_withdrawn(s):
        return "stopping by force"
    if (
        live is not None
        and live.leader != s.state.leader
        and stage in ("starting", "training", "stopping")
    ):
        return "taking over"
    return stage


def show(s: Context) -> list[Decision]:
    """What a person at the terminal sees, when it has changed and not more than twice a second."""
    if s.seen.age(s.seen.shown_at) < SHOW_SECONDS or s.state.created is None:
        return []
    places = s.state.live.nodes if s.state.live is not None else s.places()
    standing = [
        n for n, r in s.state.nodes.items() if r.role == "buffer" and s.seen.view(n).connected
    ]
    line = s.seen.line
    now = Show(
        stage=s.state.stage,
        step=s.step,
        steps=s.config.train.steps,
        loss=number_in(line, "loss"),
        tokens_per_second=number_in(line, "tokens_per_second"),
        active_nodes=sum(s.seen.view(n).connected for n in places),
        buffer_nodes=len(standing),
        attempt=s.state.attempt.name if s.state.attempt else "",
        last_incident=s.state.last_incident,
    )
    return [] if now == s.seen.shown else [now]


def end(s: Context) -> list[Decision]:
    return stop.leave(s) if s.state.stage in TERMINAL else []


LAST: tuple[Rule, ...] = (held.drop, nodes.acknowledge, show, end)
