"""A run is finished when its last weights are in a checkpoint, and not before."""

from opt_logbook.record.events import (
    AttemptEnded,
    CheckpointCommitted,
    IncidentDiagnosed,
    RunFinished,
    RunHalted,
    SaveAbandoned,
)

from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.simulation.world import World


def test_steps_whose_last_save_was_not_committed_are_done_again() -> None:
    """A full disk at the last moment must not end a run of weeks as finished, its last weights in
    no checkpoint."""
    world = World()
    world.start_supervisor()
    world.until(CheckpointCommitted, 2)
    world.storage.fail_commits = 1
    world.run()
    assert [entry.step for entry in world.entries(SaveAbandoned)] == [9]
    assert [ended.outcome for ended in world.events(AttemptEnded)] == ["failed", "finished"]
    assert [found.cause for found in world.events(IncidentDiagnosed)] == ["storage"]
    assert [(entry.attempt, entry.step) for entry in world.entries(CheckpointCommitted)][-1] == (
        "1.01",
        9,
    )
    assert len(world.events(RunFinished)) == 1
    assert world.finish is not None
    assert world.finish.code == DONE


def test_a_last_save_that_never_succeeds_is_for_a_person() -> None:
    world = World()
    world.start_supervisor()
    world.until(CheckpointCommitted, 2)
    world.storage.fail_commits = 100
    world.run()
    assert world.events(RunFinished) == []
    assert "storage" in world.events(RunHalted)[0].question
    assert world.finish is not None
    assert world.finish.code == PERSON_MUST_DECIDE
