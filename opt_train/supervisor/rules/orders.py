"""Rules of stopping: an order first, a kill when it is not agreed on, rest when nothing lives."""

from opt_logbook.record.events import AttemptEnded, OrderEnded, RunStopped

from opt_train.protocol.commands import Relay
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE, STOPPED
from opt_train.protocol.orders import SaveAndStop
from opt_train.run.checkpoint import MEMORY
from opt_train.run.state import SUPERSEDED, OrderRecord, Stage
from opt_train.supervisor.effects import Finish, Send
from opt_train.supervisor.rules.attempts import report_dropped
from opt_train.supervisor.rules.checkpoints import abandon_unfinished, saves_in_flight
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.nodes import LEAVE, LEAVE_AGAIN_SECONDS, close_incidents

RELAY_AGAIN_SECONDS = 5.0
LONG_PHASES = ("checkpoint", "evaluation")
IMPATIENT_STOPS = 2
"""Asked this often, the supervisor stops without waiting for the ranks to save."""


def is_withdrawn(s: Context) -> bool:
    stop = s.state.stop_wanted
    return stop is not None and stop.outcome == "withdrawn"


def hear_obedience(s: Context) -> list[Decision]:
    """The ranks took the order at one boundary."""
    order = s.state.order
    if order is None or order.outcome or order.number not in s.view.obeyed:
        return []
    return [Record(OrderEnded(order.number, "obeyed"), step=s.view.obeyed[order.number])]


def withdraw(s: Context) -> list[Decision]:
    """The order is not agreed on in time, or is not worth the wait: it becomes a kill."""
    stop = s.state.stop_wanted
    if stop is None or stop.outcome == "withdrawn":
        return []
    nothing_new = not s.attempt.began
    impatient = s.view.stops >= IMPATIENT_STOPS
    late = not stop.outcome and s.view.watching and _is_late(s)
    if not (nothing_new or impatient or late):
        return []
    return [Record(OrderEnded(stop.number, "withdrawn"), step=s.step)]


def _is_late(s: Context) -> bool:
    """No agreement within a step's limit, phases apart in which no step ends."""
    limit = s.view.timeouts.limit("step", first=False)
    if s.view.age(s.view.order_since) <= limit:
        return False
    generation = s.attempt.generation
    busy = any(
        slot.phase in LONG_PHASES
        for node, slot in s.running(generation)
        if s.view.node(node).connected
    )
    return not busy or s.view.age(s.view.moved_at) > limit


def relay(s: Context) -> list[Decision]:
    """Tell rank 0, again and again: a number it has heard is no news to it."""
    stop = s.state.stop_wanted
    if stop is None or stop.outcome:
        return []
    node, _ = s.attempt.place_of(0)
    order = Relay(s.attempt.generation, SaveAndStop(stop.number, stop.reason))
    connected = s.view.node(node).connected
    if not connected or s.view.was_sent(Send(node, order), within=RELAY_AGAIN_SECONDS):
        return []
    return [Send(node, order)]


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
    """A stop is wanted, or the ranks stopped of themselves, and nothing lives: the run comes to
    rest."""
    stop = s.state.stop_wanted
    last = s.state.attempt
    by_themselves = s.state.stage is Stage.STOPPING
    if s.state.live is not None or (stop is None and not by_themselves):
        return []
    if stop is not None and last is not None and last.outcome == "failed" and _began_anew(s, stop):
        return [Record(OrderEnded(stop.number, SUPERSEDED))]
    decisions: list[Decision] = []
    if stop is not None and not stop.outcome:
        decisions.append(Record(OrderEnded(stop.number, "withdrawn")))
    told = s.view.generation(last.generation).notices if last is not None else {}
    by = (
        stop.reason
        if stop is not None
        else next((t.reason for t in told.values() if t.reason), "the scheduler")
    )
    saved = max(
        (c.step for c in s.state.chain() if not c.rejected and c.tier != MEMORY), default=-1
    )
    return [*decisions, *close_incidents(s, "stopped"), Record(RunStopped(by, saved))]


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
    return [farewell(s)]


def farewell(s: Context) -> Finish:
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
    return Finish(
        STOPPED, f"stopped by {state.stopped_by}; {saved}; start the same command again to go on"
    )
