"""A person who holds the simulated run, and perhaps resumes it: what was asked last lies in the
inbox until it is on record, whoever leads or nobody."""

from typing import TYPE_CHECKING

from opt_logbook.record.events import Entry

from opt_train.run.fold import fold
from opt_train.run.hold import Hold, hold_after, hold_event
from opt_train.run.state import RunState, Stage
from opt_train.supervisor.inputs import InboxReceived

if TYPE_CHECKING:
    from opt_train.simulation.world import World


def ask(world: "World", kind: str) -> None:
    """Leave the request, in the place of an older one."""
    world.request = {"kind": kind, "by": "a person", "reason": "", "asked": world.now}
    deliver(world)


def hold_in_force(world: "World") -> Hold | None:
    """The hold in force once what was asked is obeyed."""
    hold = world.replayed.hold
    event = hold_event(world.request or {}, hold)
    return hold if event is None else hold_after(event, world.now)


def deliver(world: "World") -> None:
    """The supervisor reads its inbox; what is on record leaves it."""
    if world.request is None:
        return
    if hold_event(world.request, world.replayed.hold) is None or world.replayed.finished:
        world.request = None
    elif world.core is not None:
        world.feed(InboxReceived(world.request))


def journal_first(world: "World", state: RunState, wall: float) -> tuple[RunState, list[Entry]]:
    """What was asked while nobody led, on record before a supervisor begins anything."""
    event = hold_event(world.request or {}, state.hold)
    if event is None or state.stage in (Stage.NEW, Stage.FINISHED):
        return state, []
    attempt = state.attempt.name if state.attempt is not None else ""
    entry = Entry(round(wall, 3), attempt, None, event)
    return fold(state, entry), [entry]
