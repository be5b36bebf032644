"""Ranks find a committed checkpoint corrupt as they read it: it is rejected on record, an older one
is taken, and neither the budget of restarts nor a node pays for it."""

import pytest
from opt_logbook.record.events import (
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    IncidentDiagnosed,
    NodeFailed,
    RunHalted,
)

from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.simulation.world import World
from tests.supervisor.started import a_run, code_of

STEP_6 = "checkpoints/1.00/step-00000006"
FLIPPED = "shard-00002-model-00001-of-00001.safetensors has a wrong checksum"


def run_with_flipped(why: str = FLIPPED, **changes: object) -> World:
    """To the end of a run, one rank of which dies when step 6 is its newest checkpoint: `why`."""
    world = a_run(**changes).until_step(7)
    world.storage.flipped[STEP_6] = why
    world.kill_rank(0)
    return world.run()


def test_what_ranks_find_corrupt_is_rejected_and_the_one_before_taken() -> None:
    world = run_with_flipped()
    assert [entry.step for entry in world.entries(AttemptStarted)] == [0, 6, 3]
    (rejected,) = world.entries(CheckpointRejected)
    assert (rejected.event.path, rejected.step, rejected.attempt) == (STEP_6, 6, "1.00")
    assert FLIPPED in rejected.event.why
    assert code_of(world) == DONE


@pytest.mark.parametrize(
    "why", [FLIPPED, "shard-00001.safetensors cannot be read: Input/output error"]
)
def test_the_storage_is_blamed_and_no_node(why: str) -> None:
    """Whatever the log's line looks like: a file system that cannot read a file is not full."""
    world = run_with_flipped(why)
    diagnosed = world.events(IncidentDiagnosed)[-1]
    assert (diagnosed.cause, diagnosed.blame) == ("corrupt_checkpoint", "storage")
    assert (diagnosed.node, diagnosed.rank) == ("", -1)
    assert any("rank 1" in evidence.text for evidence in diagnosed.evidence)
    assert world.events(NodeFailed) == []


def test_a_chain_of_corrupt_checkpoints_uses_up_no_budget() -> None:
    """Fourteen in a row, where two failures of one cause, and six in all, would halt the run."""
    world = a_run(steps=40, every_steps=2, keep=20, restarts_without_progress=2).until_step(33)
    saved = [entry.event.path for entry in world.entries(CheckpointCommitted)]
    assert len(saved) > 14
    world.storage.flipped = dict.fromkeys(saved[-14:], FLIPPED)
    world.kill_rank(0)
    world.run(2000)
    assert [event.path for event in world.events(CheckpointRejected)] == saved[-14:][::-1]
    assert world.events(RunHalted) == []
    assert code_of(world) == DONE


def test_budgets_that_other_causes_have_used_up_do_not_end_the_search() -> None:
    """Three failures in all are allowed, and three there were before the checkpoint was read."""
    world = a_run(restarts_without_progress=1).until_step(7)
    for attempts, text in enumerate(("", "ZeroDivisionError: by zero", "No space left on device")):
        world.until(AttemptStarted, attempts + 1).until_step(7)
        if attempts == 2:
            world.storage.flipped[STEP_6] = FLIPPED
        world.kill_rank(0, code=1 if text else None, text=text)
    world.run()
    causes = [event.cause for event in world.events(IncidentDiagnosed)]
    assert causes == ["killed", "user_code", "storage", "corrupt_checkpoint"]
    assert code_of(world) == DONE


def test_when_every_checkpoint_is_corrupt_a_person_is_asked() -> None:
    world = a_run().until_step(7)
    world.storage.flipped = dict.fromkeys(world.storage.disk, FLIPPED)
    world.kill_rank(0)
    world.run()
    assert len(world.events(CheckpointRejected)) == 2
    (halted,) = world.events(RunHalted)
    assert "never starts from scratch" in halted.question
    assert code_of(world) == PERSON_MUST_DECIDE


def test_after_the_first_step_the_same_cause_rejects_nothing_and_is_counted() -> None:
    """A log line that looks like it says nothing against what was restored, and has trained."""
    world = a_run(restarts_without_progress=2)
    world.poison = (4, "RuntimeError: checkpoint step-4 does not verify")
    world.run()
    assert world.events(IncidentDiagnosed)[-1].cause == "corrupt_checkpoint"
    assert world.events(CheckpointRejected) == []
    assert code_of(world) == PERSON_MUST_DECIDE
