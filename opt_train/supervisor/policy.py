"""What to do now: one table of rules a stage, looked through from the top; the first rule that has something wins.

`decide` is pure and changes nothing. Each decision, once carried out, changes the state (it was journalled) or the
observation (it was sent), so that the same rule is silent next time: the core asks until there is nothing left.
"""

from collections.abc import Callable, Mapping

from opt_train.config import RunConfig
from opt_train.supervisor import policy_attempt as attempt
from opt_train.supervisor import policy_failure as failure
from opt_train.supervisor import policy_held as held
from opt_train.supervisor import policy_nodes as nodes
from opt_train.supervisor import policy_saves as saves
from opt_train.supervisor import policy_stop as stop
from opt_train.supervisor import policy_watch as watch
from opt_train.supervisor.effects import Show
from opt_train.supervisor.inputs import Identity
from opt_train.supervisor.observation import Observation
from opt_train.supervisor.policy_situation import Decision, Situation, number_in
from opt_train.supervisor.state import TERMINAL, RunState

Rule = Callable[[Situation], list[Decision]]

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
    failure.see_death,
    failure.see_node_down,
    watch.watch_missing,
    watch.watch_hang,
    watch.watch_silence,
)
DIE: tuple[Rule, ...] = (failure.kill, failure.conclude_kill)
KEEP: tuple[Rule, ...] = (nodes.lose_buffers, nodes.expel)

GATHER: tuple[Rule, ...] = (
    stop.rest,
    failure.follow,
    nodes.lose_buffers,
    nodes.lose_places,
    nodes.fill_places,
    nodes.expel,
    attempt.verify,
    attempt.start,
)
TAKE_OVER: tuple[Rule, ...] = (
    failure.see_other_lineage,
    failure.see_death,
    failure.see_node_down,
    attempt.adopt,
    watch.watch_missing,
    watch.watch_silence,
)
TRAIN: tuple[Rule, ...] = (
    *LISTEN, *SAVE, *HOLD, saves.retire, failure.see_unsaved_end, attempt.end_by_itself, *SIGNS, attempt.begin_ranks,
    *KEEP,
)  # fmt: skip
STOP: tuple[Rule, ...] = (
    stop.hear_obedience, *LISTEN, *SAVE, *HOLD, saves.retire, failure.see_unsaved_end, attempt.end_by_itself,
    stop.withdraw,
)  # fmt: skip

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


def decide(state: RunState, seen: Observation, config: RunConfig, identity: Identity) -> list[Decision]:
    """The next decisions, in order; none when all is as it should be."""
    situation = Situation(state, seen, config, identity)
    for rule in (*HEAR, *STAGES.get(stage_of(situation), ()), *LAST):
        decisions = rule(situation)
        if decisions:
            return decisions
    return []


def stage_of(s: Situation) -> str:
    """The state's stage, told apart by who is in charge of its ranks and by what was asked."""
    stage, live = s.state.stage, s.state.live
    if stage == "stopping" and live is None:
        return "at rest"
    if stage == "stopping" and stop.is_withdrawn(s):
        return "stopping by force"
    if live is not None and live.leader != s.state.leader and stage in ("starting", "training", "stopping"):
        return "taking over"
    return stage


def show(s: Situation) -> list[Decision]:
    """What a person at the terminal sees, when it has changed and not more than twice a second."""
    if s.seen.age(s.seen.shown_at) < SHOW_SECONDS or s.state.created is None:
        return []
    places = s.state.live.nodes if s.state.live is not None else s.places()
    standing = [n for n, r in s.state.nodes.items() if r.role == "buffer" and s.seen.view(n).connected]
    line = s.seen.line
    now = Show(
        stage=s.state.stage, step=s.step, steps=s.config.train.steps, loss=number_in(line, "loss"),
        tokens_per_second=number_in(line, "tokens_per_second"),
        active_nodes=sum(s.seen.view(n).connected for n in places), buffer_nodes=len(standing),
        attempt=s.state.attempt.name if s.state.attempt else "", last_incident=s.state.last_incident,
    )  # fmt: skip
    return [] if now == s.seen.shown else [now]


def end(s: Situation) -> list[Decision]:
    return stop.leave(s) if s.state.stage in TERMINAL else []


LAST: tuple[Rule, ...] = (held.drop, nodes.acknowledge, show, end)
