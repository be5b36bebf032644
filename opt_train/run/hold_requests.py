"""How a hold is asked for and taken back: messages in the inbox, also while nobody leads the run.

Whoever would start the run next obeys them first. Of a hold and a resume only the newer waits
there: the order of messages is only as good as the clocks of those who wrote them.
"""

import time
from collections.abc import Callable

from opt_logbook.record import inbox, journal
from opt_logbook.record.events import Event
from opt_logbook.record.run_directory import RunDirectory

from opt_train.run.fold import fold
from opt_train.run.hold import HOLD, RESUME, Hold, hold_after, hold_event, refusal
from opt_train.run.state import RunState


def hold_in_force(run: RunDirectory, on_record: Hold | None) -> Hold | None:
    """The hold in force once the messages that wait are obeyed. Changes nothing.

    Args:
        on_record: what the journal says.
    """
    hold = on_record
    for message in inbox.peek(run):
        event = hold_event(message, hold)
        hold = hold if event is None else hold_after(event, time.time())
    return hold


def why_held(run: RunDirectory) -> str:
    """Why nothing may be started here; empty: it may."""
    # Nobody leads yet who had folded it, and what begins here may be Slurm's doing, at night.
    state = RunState()
    for entry in journal.read(run.journal).entries:
        state = fold(state, entry)
    hold = hold_in_force(run, state.hold)
    return refusal(hold, run.path) if hold is not None else ""


def journal_holds(
    run: RunDirectory, on_record: Hold | None, append: Callable[[Event], object]
) -> None:
    """Journal what the messages that wait change about the hold, before anything is started.

    Raises:
        OSError: the journal takes no more; the messages stay.
    """
    hold = on_record
    for dropped in inbox.waiting(run):
        if dropped.message["kind"] not in (HOLD, RESUME):
            continue
        event = hold_event(dropped.message, hold)
        # Removed behind the append: a death in between has it read again, and changes nothing then.
        if event is not None:
            append(event)
            hold = hold_after(event, time.time())
        dropped.remove()


def ask_hold(run: RunDirectory, by: str, reason: str) -> None:
    """Leave a request to hold the run.

    Raises:
        OSError: the inbox cannot be written.
    """
    withdraw(run, RESUME)
    message = {"kind": HOLD, "by": by, "reason": reason, "asked": round(time.time(), 3)}
    inbox.drop(run, message)


def ask_resume(run: RunDirectory, by: str) -> None:
    """Leave a request to take the hold back.

    Raises:
        OSError: the inbox cannot be written.
    """
    withdraw(run, HOLD)
    inbox.drop(run, {"kind": RESUME, "by": by})


def withdraw(run: RunDirectory, kind: str) -> None:
    """Take back the messages of the kind that nobody has obeyed yet."""
    for dropped in inbox.waiting(run):
        if dropped.message["kind"] == kind:
            dropped.remove()
