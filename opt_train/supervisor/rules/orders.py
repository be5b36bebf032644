"""Rules about orders: given, relayed to rank 0 until the ranks obeyed; a stop on its way down.

An order that the ranks do not agree on in time is withdrawn, and the generation dies: nobody can
know which ranks would still take it. A stop then goes on by force; any other order has failed, and
the run restarts without it. What was not obeyed when ranks die of something else stays in the
queue and is relayed to the next generation.

A rollback comes about in any case. Ranks that have a snapshot of its step in their own memory go
back in place: they are another attempt and generation from one step to the next, and `follow_back`
journals it with the fact that says so. Where they have none, they are ended (`begin_rollback`), and
where they die before they obey, they are dead: every restart while the order is outstanding begins
at its step or before (`RunState.newest_good`), and so has obeyed it.
"""

from opt_logbook.record.events import (
    AttemptEnded,
    OrderEnded,
    OrderGiven,
    RunStopped,
)
from opt_logbook.record.stability_events import RollbackBegan

from opt_train.protocol.commands import Relay
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE, STOPPED
from opt_train.protocol.orders import Order, RollBack, SaveAndStop, parameters_of
from opt_train.run.checkpoint import MEMORY
from opt_train.run.code.code_state import CodeState
from opt_train.run.entries import attempt_started
from opt_train.run.hold import HOLD_OF, refusal
from opt_train.run.state import (
    OBEYED,
    REPLACED,
    ROLLED_BACK,
    SUPERSEDED,
    WITHDRAWN,
    OrderRecord,
    Stage,
)
from opt_train.supervisor.effects import Finish, Send
from opt_train.supervisor.rules.attempts import report_dropped
from opt_train.supervisor.rules.checkpoints import abandon_unfinished, saves_in_flight
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.failures import failure
from opt_train.supervisor.rules.nodes import LEAVE, LEAVE_AGAIN_SECONDS, close_incidents

RELAY_AGAIN_SECONDS = 5.0
LONG_PHASES = ("checkpoint", "evaluation")
IMPATIENT_STOPS = 2
"""Asked this often, the supervisor stops without waiting for the ranks to save."""


def order_given(order: Order) -> OrderGiven:
    """The journal line that gives `order`: it is in the queue from here on."""
    return OrderGiven(order.number, order.kind, order.reason, parameters_of(order))


def obey_hold(s: Context) -> list[Decision]:
    """A person holds the run: ranks that may live are asked to save and stop."""
    hold = s.state.hold
    # As a rule and not at once with the request: whoever takes over in between gives it too.
    if hold is None or s.state.live is None or s.state.stop_wanted is not None:
        return []
    stop = SaveAndStop(s.state.orders_given + 1, f"{HOLD_OF}{hold.by}")
    return [Record(order_given(stop))]


def is_withdrawn(s: Context) -> bool:
    stop = s.state.stop_wanted
    return stop is not None and stop.outcome == WITHDRAWN


def report_obedience(s: Context) -> list[Decision]:
    """The ranks took orders, each at one boundary."""
    return [
        Record(OrderEnded(order.number, OBEYED), step=s.view.obeyed[order.number])
        for order in s.state.outstanding_orders
        if order.number in s.view.obeyed and not isinstance(order.order, RollBack)
    ]


def report_rollback(s: Context) -> list[Decision]:
    """The attempt begins where a rollback wanted it to, or before."""
    order = s.state.rollback
    if order is None or s.attempt.generation < order.generation:
        return []
    return [Record(OrderEnded(order.number, OBEYED), step=s.attempt.start_step)]


def follow_back(s: Context, number: int) -> list[Decision]:
    """The ranks have obeyed order `number`: if it is the rollback, they are another attempt. To be
    journalled with the very input that says so, as the next may be a line of its metrics."""
    order, live = s.state.rollback, s.state.live
    if order is None or order.number != number or live is None:
        return []
    # Ranks that are being ended are ended all the same, and the next ones begin there.
    if s.state.stage not in (Stage.STARTING, Stage.TRAINING, Stage.STOPPING):
        return []
    if live.generation >= order.generation:
        return []
    identity = s.identity
    started = attempt_started(
        s.state.newest_good(),
        CodeState(identity.git_commit, identity.git_dirty, identity.packages),
        generation=order.generation,
        nodes=live.nodes,
        world_size=live.world_size,
        reason=f"rollback to step {order.step}: {order.reason}",
        config_sha256=identity.config_sha256,
        rollback=number,
    )
    # In this order: a supervisor that dies in between finds ranks that it does not know, ends them,
    # and begins again where the order wants it.
    return [
        *abandon_unfinished(s, "the ranks had gone back before it was complete"),
        Record(AttemptEnded(live.generation, ROLLED_BACK), step=s.step),
        Record(started, step=order.step, attempt=order.attempt),
        Record(OrderEnded(number, OBEYED), step=order.step),
    ]


def begin_rollback(s: Context) -> list[Decision]:
    """A rollback is ordered whose snapshot the ranks do not have: they are ended to begin again."""
    order, attempt = s.state.rollback, s.attempt
    if order is None or not attempt.began or s.generation.exits or _is_in_memory(s, order):
        return []
    return [Record(RollbackBegan(attempt.generation, order.number), step=s.step)]


def _is_in_memory(s: Context, order: RollBack) -> bool:
    """Whether the ranks that run now have taken a snapshot of the step that is gone back to, which
    is whole."""
    target = s.state.newest_good()
    return (
        target is not None
        and target.tier == MEMORY
        and target.step == order.step
        and target.attempt in s.attempt.lived_as
    )


def withdraw(s: Context) -> list[Decision]:
    """The stop is not agreed on in time, or is not worth the wait: it becomes a kill."""
    stop = s.state.stop_wanted
    if stop is None or stop.outcome == WITHDRAWN:
        return []
    # Before the first step there is nothing that the checkpoint it began with does not have.
    nothing_new = not s.attempt.began
    impatient = s.view.stops >= IMPATIENT_STOPS
    late = not stop.outcome and s.view.watching and _is_late(s)
    if not (nothing_new or impatient or late):
        return []
    return [Record(OrderEnded(stop.number, WITHDRAWN), step=s.step)]


def fail_late_order(s: Context) -> list[Decision]:
    """An order other than a stop is not agreed on in time: withdrawn, and the ranks are killed."""
    if not s.state.outstanding_orders or not s.attempt.began:
        return []
    if not s.view.watching or not _is_late(s):
        return []
    oldest = s.state.outstanding_orders[0]
    node, _ = s.attempt.place_of(0)
    waited = s.view.age(s.view.order_since)
    what = f"the ranks did not agree on order {oldest.number} within {waited:.0f} s"
    withdrawn = [
        Record(OrderEnded(order.number, WITHDRAWN), step=s.step)
        for order in s.state.outstanding_orders
        if not isinstance(order.order, RollBack)
    ]
    return [*withdrawn, *failure(s, node, 0, what, "hang")]


def _is_late(s: Context) -> bool:
    """No agreement within a step's limit, phases apart in which no step ends."""
    limit = s.view.training.timeouts.limit("step", first=False)
    if s.view.age(s.view.order_since) <= limit:
        return False
    generation = s.attempt.generation
    busy = any(
        slot.phase in LONG_PHASES
        for node, slot in s.running(generation)
        if s.view.node(node).connected
    )
    return not busy or s.view.age(s.view.training.moved_at) > limit


def relay(s: Context) -> list[Decision]:
    """Send what is outstanding to rank 0, oldest first and again and again: a number that it has
    received is no news to it."""
    node, _ = s.attempt.place_of(0)
    if not s.view.node(node).connected:
        return []
    decisions: list[Decision] = []
    for record in s.state.outstanding_orders:
        if isinstance(record.order, RollBack) and not _is_in_memory(s, record.order):
            continue
        # To rank 0 alone: four ranks that each read a pipe of their own obeyed 19 to 20 of 20
        # orders at different steps. With the number in the step stats none did (measured).
        command = Relay(s.attempt.generation, record.order)
        if not s.view.was_sent(Send(node, command), within=RELAY_AGAIN_SECONDS):
            decisions.append(Send(node, command))
    return decisions


def end_stopped(s: Context) -> list[Decision]:
    """Killed because they did not stop when asked."""
    if not s.attempt.killed or saves_in_flight(s):
        return []
    return [
        *abandon_unfinished(s, "the run was stopped before it was complete"),
        *report_dropped(s),
        Record(AttemptEnded(s.attempt.generation, "stopped"), step=s.step),
    ]


def rest(s: Context) -> list[Decision]:
    """A stop is wanted, a person holds the run, or the ranks stopped of themselves, and nothing
    lives: the run comes to rest."""
    stop, hold = s.state.stop_wanted, s.state.hold
    last = s.state.attempt
    by_themselves = s.state.stage is Stage.STOPPING
    if s.state.live is not None or (stop is None and hold is None and not by_themselves):
        return []
    # A hold is no stop that a start could countermand.
    if (
        stop is not None
        and hold is None
        and last is not None
        and last.outcome in ("failed", REPLACED, ROLLED_BACK)
        and _began_anew(s, stop)
    ):
        return [Record(OrderEnded(stop.number, SUPERSEDED))]
    decisions: list[Decision] = [
        Record(OrderEnded(order.number, WITHDRAWN)) for order in s.state.outstanding_orders
    ]
    stopped = RunStopped(_stopped_by(s), s.state.saved_for_later)
    return [*decisions, *close_incidents(s, "stopped"), Record(stopped)]


def _stopped_by(s: Context) -> str:
    """Who asked for the stop; of ranks that stopped of themselves, what they gave as their
    reason."""
    stop, last, hold = s.state.stop_wanted, s.state.attempt, s.state.hold
    if stop is not None:
        return stop.reason
    if hold is not None:
        return f"{HOLD_OF}{hold.by}"
    notices = s.view.generation(last.generation).notices if last is not None else {}
    return next((t.reason for t in notices.values() if t.reason), "the scheduler")


def _began_anew(s: Context, stop: OrderRecord) -> bool:
    """Supervisor, agents and ranks were all ended in the middle of the stop: whoever starts the run
    again means it."""
    agents = [view for view in s.view.nodes.values() if view.pid]
    return (
        stop.leader < s.state.leader
        and bool(agents)
        and all(a.first_leader == s.state.leader for a in agents)
    )


def leave(s: Context) -> list[Decision]:
    """The run rests: agents give their nodes back, and the supervisor is done."""
    for node, view in s.view.nodes.items():
        if view.connected and not s.view.was_sent(Send(node, LEAVE), within=LEAVE_AGAIN_SECONDS):
            return [Send(node, LEAVE)]
    return [final_effect(s)]


def final_effect(s: Context) -> Finish:
    """How the command ends, and what it says."""
    state = s.state
    if state.stage is Stage.FINISHED and state.finished is not None:
        done = state.finished
        return Finish(
            DONE,
            f"finished: loss {done.loss:.4f}, validation perplexity "
            f"{done.validation_perplexity:.2f}",
        )
    if state.stage is Stage.HALTED:
        return Finish(PERSON_MUST_DECIDE, state.question)
    saved = (
        f"saved at step {state.saved_step}" if state.saved_step >= 0 else "nothing was saved yet"
    )
    if state.hold is not None:
        return Finish(STOPPED, f"{saved}; {refusal(state.hold, s.identity.run_directory)}")
    return Finish(
        STOPPED, f"stopped by {state.stopped_by}; {saved}; start the same command again to go on"
    )
