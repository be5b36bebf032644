"""The table that moves a run's stage: whole, without dead ends, and what runs really do."""

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    Entry,
    Event,
    FailureSeen,
    LineageOpened,
    OrderGiven,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SupervisorStarted,
    TrainingBegan,
)
from opt_logbook.record.node_events import GrowthBegan, ReplacementBegan
from opt_logbook.record.stability_events import RollbackBegan

from opt_train.protocol.orders import SaveAndStop
from opt_train.run.fold import HANDLERS, fold
from opt_train.run.state import (
    REGARDLESS,
    TERMINAL,
    TRANSITIONS,
    EventCase,
    RunState,
    Stage,
    Trigger,
    next_stage,
    trigger_of,
)
from opt_train.simulation.histories import run_history

STARTS = {SupervisorStarted, LineageOpened, AttemptStarted}
"""What starts a run: a supervisor, a person's new lineage, a standalone `train`."""
MOVES = {RunCreated, AttemptStarted, TrainingBegan, AttemptEnded, FailureSeen, OrderGiven}
MOVES |= {
    ReplacementBegan,
    RollbackBegan,
    GrowthBegan,
    RunFinished,
    RunStopped,
    RunHalted,
    LineageOpened,
    SupervisorStarted,
}


def kind_of(trigger: Trigger) -> type[Event]:
    return trigger.event if isinstance(trigger, EventCase) else trigger


def test_every_stage_is_reached_from_a_new_run() -> None:
    reached = {Stage.NEW}
    while (
        more := {after for (stage, _), after in TRANSITIONS.items() if stage in reached} - reached
    ):
        reached |= more
    assert reached == set(Stage)


def test_every_stage_leads_on_and_every_run_can_come_to_an_end() -> None:
    ending = set(TERMINAL)
    for _ in Stage:
        ending |= {stage for (stage, _), after in TRANSITIONS.items() if after in ending}
    assert ending == set(Stage)
    assert {stage for stage, _ in TRANSITIONS} == set(Stage)


def test_a_run_that_rests_is_left_only_by_a_start() -> None:
    for stage, trigger in TRANSITIONS:
        if stage in TERMINAL:
            assert kind_of(trigger) in STARTS, f"{stage} is left by {trigger}"


def test_every_trigger_is_of_a_kind_that_is_journalled_and_folded() -> None:
    triggers = {trigger for _, trigger in TRANSITIONS} | set(REGARDLESS)
    assert {kind_of(trigger) for trigger in triggers} == MOVES
    assert set(Event.registry.values()) >= MOVES
    assert set(HANDLERS) >= MOVES, "fold looks no stage up for an event without a handler"


def test_what_holds_from_every_stage_is_what_the_table_says() -> None:
    """A damaged journal must not lead a run to where an undamaged one never goes."""
    for (_, trigger), after in TRANSITIONS.items():
        assert REGARDLESS.get(trigger, after) is after


def test_an_event_of_no_row_leaves_the_stage() -> None:
    for stage in Stage:
        for kind in set(Event.registry.values()) - MOVES:
            event = object.__new__(kind)
            assert next_stage(stage, event, lives=True) is stage


def test_nothing_to_kill_is_no_failing_run() -> None:
    """A journal whose lines are lost may see a failure without an attempt: no rule of `failing`
    could end it."""
    seen = FailureSeen(1, 1, "n0", 0, "rank 0 ended", "exit")
    state = fold(RunState(stage=Stage.RECOVERING), Entry(1.0, "", 0, seen))
    assert state.stage is Stage.RECOVERING


@pytest.mark.parametrize("stage", Stage)
def test_only_an_order_to_stop_stops(stage: Stage) -> None:
    after = next_stage(stage, OrderGiven(1, "save", "a person"), lives=True)
    assert after is stage
    stopped = next_stage(stage, OrderGiven(1, SaveAndStop.kind, "a person"), lives=True)
    ranks_may_live = stage in (Stage.STARTING, Stage.TRAINING)
    assert stopped is (Stage.STOPPING if ranks_may_live else stage)


def test_whole_runs_take_transitions_of_the_table_alone() -> None:
    """`REGARDLESS` is for damaged journals: a run whose every line is there needs no row of it."""
    taken: set[tuple[Stage, Trigger]] = set()
    for seed in range(150):
        state = RunState()
        for entry in run_history(seed).journal:
            trigger = trigger_of(entry.event, lives=state.live is not None)
            if (state.stage, trigger) in TRANSITIONS:
                taken.add((state.stage, trigger))
            else:
                assert trigger not in REGARDLESS, f"history {seed}: {state.stage}, {trigger}"
            state = fold(state, entry)
    assert len(taken) >= 15, "these histories are worth walking"
