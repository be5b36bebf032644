"""Rules of an attempt's life: which checkpoint, when to begin, ranks in their places, what is in
force, the end."""

import math
from pathlib import Path

from opt_logbook.record.events import (
    AgentsAdopted,
    AttemptEnded,
    CheckpointRejected,
    IncidentClosed,
    InForceReported,
    MetricsDropped,
    OrderEnded,
)
from opt_logbook.record.run_directory import RunDirectory

from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import STOPPED
from opt_train.protocol.facts import Store
from opt_train.protocol.orders import SaveAndStop
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import Checkpoint
from opt_train.run.code.code_state import CodeState
from opt_train.run.entries import (
    attempt_started,
    run_finished,
    training_began,
    validation_measured,
)
from opt_train.run.fabric_settings import settings_apart, settings_difference
from opt_train.run.state import OBEYED, REPLACED, WITHDRAWN
from opt_train.supervisor.effects import ClearUncommitted, InspectCheckpoint, Send
from opt_train.supervisor.rules import preflights, snapshots
from opt_train.supervisor.rules.checkpoints import abandon_unfinished, saves_in_flight
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.nodes import close_incidents, halt

BUFFER_SECONDS = 5.0
"""How long the first attempt waits for nodes that only stand by."""
BEGIN_AGAIN_SECONDS = 5.0
VERIFY_AGAIN_SECONDS = 600.0


# Before it ----------------------------------------------------------------------------------------


def verify(s: Context) -> list[Decision]:
    """The newest good checkpoint of the live chain is read again before it is used; a bad one is
    passed over."""
    wanted = s.state.newest_good()
    if wanted is None and s.state.rollback is not None:
        return []  # to the beginning, as it was ordered and is on record
    if wanted is None:
        # Snapshots come and go: a run that has lost them all, and has saved nothing, begins again.
        rejected = [c for c in s.state.chain() if c.rejected and not c.is_with_agents]
        if not rejected:
            return []
        # Never silently from scratch (invariant 2): metaseq trains from step 0 when the file that
        # it should restore is missing.
        question = (
            f"no checkpoint of this run verifies any more, {rejected[-1].path} last, and it never "
            "starts from scratch "
            f"by itself; mend the storage, or begin another run with name=<other>."
        )
        return halt(s, question, "corrupt_checkpoint")
    if wanted.is_with_agents:
        return snapshots.bring_together(s, wanted)
    answer = s.view.verified.get(wanted.path)
    if answer is not None:
        rejection = CheckpointRejected(wanted.path, answer.why)
        return [Record(rejection, wanted.step, wanted.attempt)] if answer.why else []
    verify = InspectCheckpoint(wanted.path, wanted.manifest_sha256)
    return [] if s.view.was_sent(verify, within=VERIFY_AGAIN_SECONDS) else [verify]


def start(s: Context) -> list[Decision]:
    """Begin an attempt once its nodes are warm and its checkpoint is known to be good."""
    wanted = s.state.newest_good()
    if wanted is not None and not _is_ready(s, wanted):
        return []
    places = s.places()
    # Whoever is not there ends the question: of 2,000 nodes that dial in each asks it anew.
    if not all(s.view.node(n).connected for n in places):
        return []
    # Fencing makes harmless what an old rank writes; it gives back none of the GPU memory that the
    # new rank in its slot needs.
    if not all(s.is_warm(n) for n in places) or _old_ranks_live(s):
        return []
    if any(preflights.is_awaited(s, n) for n in places):
        return []
    buffers = [n for n in s.nodes if n not in places and s.is_usable(n)]
    ready = [n for n in buffers if s.view.node(n).connected]
    # Only the first attempt waits for buffer nodes: later each second here is one of downtime.
    first = s.state.attempt is None
    if first and len(ready) < len(buffers) and s.view.age(s.view.began) < BUFFER_SECONDS:
        return []
    incident = s.state.incident
    last = s.state.attempt
    # Ranks that obeyed a rollback and died of something before that was known have had it.
    reserved = s.state.rollback.generation if s.state.rollback is not None else 0
    # Keys change between two lives of the supervisor, by a person: an automatic restart differs in
    # nothing.
    news = last is None or last.leader != s.state.leader
    started = attempt_started(
        wanted,
        CodeState(s.identity.git_commit, s.identity.git_dirty, s.identity.packages),
        generation=max(s.state.generation, s.view.highest_generation, reserved) + 1,
        nodes=places,
        buffer=tuple(ready),
        world_size=len(places) * s.config.cluster.slots_per_node,
        reason=_reason(s),
        incident=incident.number if incident else 0,
        config_sha256=s.identity.config_sha256,
        difference=s.identity.operational_difference if news else (),
    )
    # Ranks that died in a save left shards that no line names: of OPT-175B 1.6 TB each time.
    # `committing` may yet succeed.
    kept = frozenset({c.path for c in s.state.checkpoints} | s.view.committing.keys())
    return [
        ClearUncommitted(tuple(s.state.history), kept),
        Record(
            started,
            step=wanted.step if wanted else 0,
            attempt=s.state.next_attempt(max(1, s.state.lineage)),
        ),
    ]


def _is_ready(s: Context, wanted: Checkpoint) -> bool:
    if wanted.is_with_agents:
        return snapshots.is_together(s, wanted)
    return wanted.path in s.view.verified


def _old_ranks_live(s: Context) -> bool:
    return any(
        slot.stage == "running"
        for view in s.view.nodes.values()
        if view.connected
        for slot in view.slots.values()
    )


def _reason(s: Context) -> str:
    incident = s.state.incident
    if incident is not None:
        return f"recovery from incident {incident.number}: {incident.cause or incident.seen.what}"
    if s.state.rollback is not None:
        order = s.state.rollback
        return f"rollback to step {order.step}: {order.reason}"
    if s.state.attempt is None:
        return "first start"
    if s.state.attempt.outcome == REPLACED:
        return "a node was replaced or added after a checkpoint; nothing had failed"
    return "resumed"


# Its ranks ----------------------------------------------------------------------------------------


def begin_ranks(s: Context) -> list[Decision]:
    """Rank 0 first; when it has reported where its store listens, all others."""
    attempt = s.attempt
    # Those that have gone back in place were begun long ago, as others.
    if attempt.began or attempt.rollback or attempt.leader != s.state.leader:
        return []
    generation = s.generation
    store = generation.store
    decisions: list[Decision] = []
    wanted = attempt.world_size if store is not None else 1
    # When all were begun, only a command that was lost is left to see to: that has time.
    if len(generation.begun) >= wanted and not s.view.watching:
        return []
    # Rank 0 binds its store to port 0 and reports what it got: a guessed port may be taken, and
    # then every rank of the generation dies of it.
    for rank in range(wanted):
        node, slot = attempt.place_of(rank)
        view = s.view.node(node)
        if not view.connected or rank in generation.exits or generation.was_running(rank):
            continue
        if rank in generation.begun and not view.caught_up:
            continue  # it may have run and ended while its agent was out of reach
        begin = _begin(s, attempt, rank, node, slot, store)
        if not s.view.was_sent(Send(node, begin), within=BEGIN_AGAIN_SECONDS):
            decisions.append(Send(node, begin))
    return decisions


def _begin(
    s: Context, attempt: Attempt, rank: int, node: str, slot: int, store: Store | None
) -> Begin:
    run = RunDirectory(Path(s.identity.run_directory))
    known = store if rank > 0 else None
    saved = next((c for c in s.state.checkpoints if c.path == attempt.checkpoint), None)
    checkpoint = str(run.path / attempt.checkpoint) if attempt.checkpoint else None
    if saved is not None and saved.is_with_agents:
        checkpoint = snapshots.folder_on(s, saved, node)
    probe = s.state.probe
    # A state from behind the one that was to look has been trained on what is to be looked at.
    if probe is not None and attempt.start_step > probe.step:
        probe = None
    return Begin(
        generation=attempt.generation,
        attempt=attempt.name,
        node=node,
        slot=slot,
        rank=rank,
        world_size=attempt.world_size,
        local_rank=slot,
        store_host=known.host if known else "",
        store_port=known.port if known else 0,
        config_path=s.identity.config_path,
        config_sha256=s.identity.config_sha256,
        run_directory=s.identity.run_directory,
        checkpoint=checkpoint,
        manifest_sha256=attempt.manifest_sha256 or None,
        order_number=s.state.settled_order,
        ledger=s.state.ledger,
        probe=probe.probe if probe is not None else (),
        probe_order=probe.number if probe is not None else 0,
    )


def adopt(s: Context) -> list[Decision]:
    """A new supervisor finds every rank of the generation training, or ended and accounted for, and
    lets them be."""
    attempt = s.attempt
    if attempt.leader == s.state.leader or attempt.lineage != s.state.lineage:
        return []
    # All or none: with one rank unaccounted for, the others may be in a collective that it will
    # never join.
    if not all(_is_accounted_for(s, attempt, rank) for rank in range(attempt.world_size)):
        return []
    return [Record(AgentsAdopted(attempt.generation, attempt.nodes))]


def _is_accounted_for(s: Context, attempt: Attempt, rank: int) -> bool:
    """It runs where it should, on a node that is connected, or has ended."""
    node, slot = attempt.place_of(rank)
    view = s.view.node(node)
    shown = view.slots.get(slot)
    runs = shown is not None and (shown.stage, shown.generation, shown.rank) == (
        "running",
        attempt.generation,
        rank,
    )
    return (runs and view.connected) or rank in s.generation.exits


def report_in_force(s: Context) -> list[Decision]:
    """Every rank has read back what is in force; differences were a failure before it came to
    this."""
    attempt = s.attempt
    reported = s.generation.in_force
    # metaseq resumed with the betas of the checkpoint in place of the new ones, and three of its
    # runs (12.35 to 12.37) tested nothing: so each rank reads back what it has.
    if attempt.in_force or len(reported) < attempt.world_size:
        return []
    environments = s.generation.environments
    before = s.state.fabric_settings
    changed = settings_difference(before, environments[0]) if before is not None else ()
    apart = settings_apart(environments)
    seconds = s.generation.start_seconds
    event = InForceReported(reported[0], environments[0], (*changed, *apart), seconds)
    return [Record(event, step=attempt.start_step)]


def begin_training(s: Context) -> list[Decision]:
    attempt = s.attempt
    if attempt.began or s.view.training.history.step <= attempt.start_step:
        return []
    # From another supervisor only wall time is known.
    step = s.view.training.history.step
    return [Record(training_began(attempt, s.view.now.wall), step=step)]


def close_recovered(s: Context) -> list[Decision]:
    """An incident is over when training is again where it was when it failed."""
    decisions: list[Decision] = []
    for incident in s.state.open_incidents:
        if not incident.first_step or s.view.training.history.step < incident.step:
            continue
        closed = IncidentClosed(
            incident.number,
            "recovered",
            steps_lost=max(0, incident.step - incident.restored_step),
            seconds_lost=round(max(0.0, s.view.now.wall - incident.opened), 3),
            down_seconds=round(max(0.0, incident.first_step - incident.opened), 3),
        )
        decisions.append(Record(closed, step=s.view.training.history.step))
    return decisions


def report_validation(s: Context) -> list[Decision]:
    return [
        Record(validation_measured(v.name, v.loss, v.tokens), step=v.step)
        for key, v in s.generation.validations.items()
        if key not in s.state.validations
    ]


# Its end ------------------------------------------------------------------------------------------


def end_by_itself(s: Context) -> list[Decision]:
    """All ranks left as they said they would: done, or stopped with the state saved."""
    attempt = s.attempt
    exits = s.generation.exits
    if len(exits) < attempt.world_size or s.generation.deaths or saves_in_flight(s):
        return []
    stopped = any(exited.code == STOPPED for _, exited in exits.values())
    decisions: list[Decision] = [
        *abandon_unfinished(s, "the ranks left before it was complete"),
        *report_dropped(s),
    ]
    for order in s.state.outstanding_orders:
        outcome = OBEYED if stopped and isinstance(order.order, SaveAndStop) else WITHDRAWN
        decisions.append(Record(OrderEnded(order.number, outcome), step=s.step))
    ended = AttemptEnded(attempt.generation, "stopped" if stopped else "finished")
    announced = [e.leaving.step for _, e in exits.values() if e.leaving is not None]
    return [
        *decisions,
        Record(ended, step=max([s.step, *announced])),
    ]


def report_dropped(s: Context) -> list[Decision]:
    """Metrics that ranks dropped over their lives, once a rank."""
    return [
        Record(MetricsDropped(rank, notice.dropped_metrics))
        for rank, notice in sorted(s.generation.notices.items())
        if notice.dropped_metrics and rank not in s.state.dropped_metrics
    ]


def finish(s: Context) -> list[Decision]:
    """All steps are done."""
    measured = s.state.validation
    loss = s.view.training.history.newest("loss")
    if loss is None:
        loss = measured.loss if measured else math.nan
    train = s.config.train
    tokens = s.view.training.history.newest("tokens")
    if tokens is None:
        tokens = train.steps * train.global_batch * s.config.data.sequence_length
    finished = run_finished(s.state, loss, int(tokens), s.view.now.wall)
    return [*close_incidents(s, "recovered"), Record(finished, step=train.steps)]
