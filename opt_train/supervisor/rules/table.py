"""What to do now: one table of rules a stage, looked through from the top; the first rule that has
something wins.

`decide` is pure and changes nothing. Each decision, once carried out, changes the state (it was
journalled) or the observation (it was sent), so that the same rule is silent next time: the core
asks until there is nothing left.
"""

from collections.abc import Callable, Mapping

from opt_train.config.run_config import RunConfig
from opt_train.run.state import TERMINAL, RunState, Stage
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.inputs import Identity
from opt_train.supervisor.rules import (
    acknowledgements,
    attempts,
    checkpoints,
    failures,
    findings,
    hangs,
    lemons,
    nodes,
    orders,
    preflights,
    returns,
    snapshots,
    status,
    world_size,
)
from opt_train.supervisor.rules.context import Context, Decision
from opt_train.supervisor.rules.stability import alarms, data_probes, learning_rate, replays

Rule = Callable[[Context], list[Decision]]

# Before all others, in every stage: what is acknowledged at the end (LAST) is on record by then.
RECEIVE: tuple[Rule, ...] = (
    findings.note,
    findings.note_drain,
    checkpoints.conclude,
    nodes.join,
    orders.obey_hold,
    world_size.start_arrived,
    world_size.request_missing,
    lemons.share,
    lemons.note,
)
SAVE: tuple[Rule, ...] = (checkpoints.abandon_failed, checkpoints.commit, snapshots.commit)
HOLD: tuple[Rule, ...] = (snapshots.copy_to_partners, snapshots.pass_on)
REPORT: tuple[Rule, ...] = (
    failures.detect_difference,
    attempts.report_in_force,
    attempts.begin_training,
    attempts.report_validation,
    data_probes.report,
    replays.report,
    attempts.close_recovered,
)
# From certain to inferred: how a process ended, what the cluster knows, who is absent, who does not
# move, who is silent. The first that has something names the incident.
SIGNS: tuple[Rule, ...] = (
    failures.detect_rank_exit,
    failures.detect_node_down,
    hangs.watch_missing,
    hangs.watch_hang,
    hangs.watch_silence,
)
RETURN: tuple[Rule, ...] = (returns.take_back, returns.begin_trial, returns.test)
KEEP: tuple[Rule, ...] = (
    nodes.lose_buffers,
    findings.take_out_unfit_buffers,
    *RETURN,
    nodes.evict,
    preflights.ask,
)

GATHER: tuple[Rule, ...] = (
    orders.rest,
    failures.follow,
    findings.take_out_unfit_places,
    findings.take_out_unfit_buffers,
    nodes.lose_buffers,
    nodes.fail_unreachable,
    nodes.promote_buffers,
    world_size.go_on_with_fewer,
    world_size.fill_places,
    lemons.pass_over,
    *RETURN,
    nodes.evict,
    preflights.ask,
    attempts.verify,
    attempts.start,
)
TRAIN: tuple[Rule, ...] = (
    orders.report_obedience,
    orders.report_rollback,
    *REPORT,
    *SAVE,
    *HOLD,
    checkpoints.retire,
    failures.detect_unsaved_end,
    attempts.end_by_itself,
    *SIGNS,
    findings.detect_finding,
    findings.begin_replacement,
    world_size.begin_growth,
    data_probes.pass_bad_data,
    alarms.close_handed_over,
    alarms.judge,
    alarms.respond,
    learning_rate.give_back,
    orders.begin_rollback,
    attempts.begin_ranks,
    orders.fail_late_order,
    orders.relay,
    *KEEP,
)
STOP: tuple[Rule, ...] = (
    orders.report_obedience,
    orders.report_rollback,
    *REPORT,
    *SAVE,
    *HOLD,
    checkpoints.retire,
    failures.detect_unsaved_end,
    attempts.end_by_itself,
    alarms.close_handed_over,
    orders.withdraw,
    *SIGNS,
    orders.relay,
    *KEEP,
)
# Reports of a save may have been on their way when a rank died: a complete one is kept.
KILL: tuple[Rule, ...] = (*SAVE, failures.kill, failures.conclude_kill)

STAGES: Mapping[Stage, tuple[Rule, ...]] = {
    Stage.ASSEMBLING: GATHER,
    Stage.RECOVERING: GATHER,
    Stage.STARTING: TRAIN,
    Stage.TRAINING: TRAIN,
    Stage.STOPPING: STOP,
    Stage.FAILING: (orders.report_obedience, *KILL, failures.identify, failures.end_failed),
    Stage.REPLACING: (orders.report_obedience, *KILL, findings.end_replaced),
    Stage.FINISHING: (attempts.finish,),
}

TAKE_OVER: tuple[Rule, ...] = (
    *SAVE,
    failures.detect_other_lineage,
    failures.detect_rank_exit,
    failures.detect_node_down,
    attempts.adopt,
    hangs.watch_missing,
    hangs.watch_silence,
    *KEEP,
)
"""While ranks may live that an older supervisor leads: nothing is asked of them until all are
found."""
STOP_BY_FORCE: tuple[Rule, ...] = (*KILL, orders.end_stopped)
"""While a stop was withdrawn and ranks may live."""
AT_REST: tuple[Rule, ...] = (orders.rest,)
"""While stopping, when no rank lives any more."""


def decide(
    state: RunState, view: ClusterView, config: RunConfig, identity: Identity
) -> list[Decision]:
    """The next decisions, in order; none when all is as it should be."""
    situation = Context(state, view, config, identity)
    for rule in (*RECEIVE, *rules_for(situation), *LAST):
        decisions = rule(situation)
        if decisions:
            return decisions
    return []


def rules_for(s: Context) -> tuple[Rule, ...]:
    """The rules of the run's stage, or those of the three situations that are no stages: the
    journal alone does not know them."""
    stage, live = s.state.stage, s.state.live
    if stage is Stage.STOPPING and live is None:
        return AT_REST
    if stage is Stage.STOPPING and orders.is_withdrawn(s):
        return STOP_BY_FORCE
    taken_over = live is not None and live.leader != s.state.leader
    if taken_over and stage in (Stage.STARTING, Stage.TRAINING, Stage.STOPPING):
        return TAKE_OVER
    return STAGES.get(stage, ())


def end(s: Context) -> list[Decision]:
    return orders.leave(s) if s.state.stage in TERMINAL else []


LAST: tuple[Rule, ...] = (snapshots.drop, acknowledgements.acknowledge, status.show, end)
