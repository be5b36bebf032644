"""How training moves: the newest metrics, how long each phase takes, and when anything last
moved."""

import math

from opt_logbook.record.events import HELD_OUT

from opt_train.config.run_config import RunConfig
from opt_train.protocol.facts import SlotState, Validation
from opt_train.protocol.framing import Message
from opt_train.run.instability import answered_up_to
from opt_train.run.state import RunState
from opt_train.stability.detectors import Detectors
from opt_train.stability.metric_history import MetricHistory
from opt_train.stability.replayed import Replayed
from opt_train.stability.signs import SIGNS
from opt_train.supervisor.inputs import MetricsRecalled, MetricsReceived
from opt_train.supervisor.phase_timeouts import FIRST_STEPS, PhaseTimeouts

HEARTBEAT_GAP_SECONDS = 3.0
"""Heartbeats come every second; across a longer gap the length of a phase is not known."""


class TrainingView:
    """Of the live attempt. All times are monotonic seconds."""

    def __init__(self, config: RunConfig, now: float) -> None:
        self.history = MetricHistory()
        """Its `step` is that of the newest line of the current attempt."""
        self.detectors = Detectors(config, SIGNS)
        self.replayed = Replayed(0)
        self.timeouts = PhaseTimeouts(config.supervisor)
        self.moved_at = now
        """When training was last seen to move."""

    def begin_attempt(self, state: RunState, now: float) -> None:
        """Another generation is in charge."""
        self.moved_at = now
        self.history.begin_attempt(state.attempt.start_step if state.attempt is not None else 0)
        # Windows of what was given up would measure the new attempt by what was wrong.
        self.detectors.rebuild(self.history)
        self.replayed = _replayed(state)

    def is_new_line(self, input_: MetricsReceived, state: RunState) -> bool:
        """Whether the line is of the current generation and of a step that has not come yet: others
        are fenced off."""
        live = state.live
        return (
            live is not None
            and input_.generation == live.generation
            and int(input_.line.get("step", -1)) > self.history.step
        )

    def apply_metrics(
        self, input_: MetricsReceived | MetricsRecalled, state: RunState, now: float
    ) -> None:
        """Take in a line of the live attempt, or what the supervisor before had filed."""
        if isinstance(input_, MetricsRecalled):
            self.history.refill(input_.before)
            self.detectors.rebuild(self.history)
            self.replayed = _replayed(state)
            lines = input_.of_attempt
        else:
            lines = (input_.line,) if self.is_new_line(input_, state) else ()
        answered = answered_in_place(state)
        if math.isfinite(answered):
            self.detectors.forget(answered)
        for line in lines:
            self.history.append(line)
            self.detectors.append(line)
            self.replayed.append(line)
        if lines:
            self.moved_at = now
            # Of several the newest alone: a new supervisor's limits begin with what is configured.
            self._learn_from_line(state)

    def apply_validation(self, fact: Message) -> None:
        """Take in what a rank says of the held-out part of the corpus; other facts are none of
        it."""
        # Of an older attempt too: it lies before what the live one has had, and counts as little.
        if isinstance(fact, Validation) and fact.name == HELD_OUT:
            self.detectors.validated(fact.step, fact.loss)

    def _learn_from_line(self, state: RunState) -> None:
        first = is_first(self.history.step, state)
        for phase in ("step", "data"):
            seconds = self.history.newest(f"{phase}_seconds")
            # A limit learned from an infinite length would never be exceeded.
            if seconds is not None and math.isfinite(seconds):
                self.timeouts.learn(phase, first, seconds)

    def apply_slot(
        self, before: SlotState, slot: SlotState, gap: float, state: RunState, now: float
    ) -> None:
        """A rank is shown in `slot`, and was in `before` `gap` seconds ago: what moved, and how
        long the phase of `before` took if it is over."""
        moved = (before.phase, before.step) != (slot.phase, slot.step)
        # Within one phase a rank's own progress report sets the phase's clock back.
        if not moved and slot.phase_seconds >= before.phase_seconds:
            return
        self.moved_at = now
        seconds = before.phase_seconds
        # The phase ended between the two heartbeats: the gap is shared out between it and the next
        # one, whose clock the agent began by itself.
        if moved and gap <= HEARTBEAT_GAP_SECONDS:
            seconds += max(0.0, gap - slot.phase_seconds)
        self.timeouts.learn(before.phase, is_first(before.step, state), seconds)


def _replayed(state: RunState) -> Replayed:
    return Replayed(state.attempt.start_step if state.attempt is not None else 0)


def is_first(step: int, state: RunState) -> bool:
    """Whether `step` is among the first after the current attempt's start."""
    return state.attempt is not None and step <= state.attempt.start_step + FIRST_STEPS


def answered_in_place(state: RunState) -> float:
    """See `answered_up_to`."""
    outstanding = [record.number for record in state.outstanding_orders]
    return answered_up_to(state.instability, outstanding, state.ledger)
