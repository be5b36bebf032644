"""What is left of a save that came to nothing: neither files on the disk nor reports in memory."""

import pytest
from opt_logbook.record.events import AttemptStarted, CheckpointCommitted, SaveAbandoned

from opt_train.protocol.facts import SavedFile, ShardsSaved
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.supervisor.effects import Append, Effect, RetireCheckpoint


def removed(world: World) -> list[str]:
    return [effect.path for effect in world.effects if isinstance(effect, RetireCheckpoint)]


def half_a_save(world: World, step: int) -> str:
    """Rank 0 has saved and said so; the other one never will."""
    found = world.find(0)
    assert found is not None
    agent, slot = found
    assert slot.rank is not None
    path = f"checkpoints/{slot.rank.begin.attempt}/step-{step:08d}"
    world.report_of(
        agent,
        slot.rank,
        ShardsSaved(step, f"/run/{path}", (SavedFile("a.safetensors", 1, "sha"),), 0.1),
    )
    world.second()
    return path


@pytest.mark.parametrize("fault", [1, -1])
def test_a_failed_save_gives_its_space_back(fault: int) -> None:
    """Shards of 1.6 TB that nobody can ever restore must not stay for the weeks an attempt may
    last."""
    world = World()
    world.start_supervisor()
    world.storage.fail_commits = fault
    world.run()
    assert [abandoned.path for abandoned in world.events(SaveAbandoned)] == [
        "checkpoints/1.00/step-00000003"
    ]
    assert removed(world) == ["checkpoints/1.00/step-00000003"]


def test_a_save_that_its_ranks_did_not_survive_gives_its_space_back() -> None:
    world = World()
    world.start_supervisor()
    world.until_step(4)
    path = half_a_save(world, 4)
    world.kill_rank(1)
    world.until(SaveAbandoned)
    assert removed(world) == [path]


def test_a_supervisor_that_died_before_removing_it_is_made_up_for() -> None:
    world = World()
    world.start_supervisor()
    world.until_step(4)
    path = half_a_save(world, 4)
    world.kill_rank(1)
    assert world.core is not None
    carry_out = world.perform

    def die_behind_it(effect: Effect) -> None:
        carry_out(effect)
        if isinstance(effect, Append) and isinstance(effect.entry.event, SaveAbandoned):
            world.lives = 0

    world.perform = die_behind_it  # type: ignore[method-assign]  # a death at one certain effect
    while world.core is not None:
        world.second()
    world.perform = carry_out  # type: ignore[method-assign]
    assert removed(world) == []
    world.start_supervisor()
    assert removed(world) == [path]
    world.run()


def test_what_nobody_could_tell_of_is_cleared_before_the_next_attempt() -> None:
    """Ranks and agents die together while they save, in every job that reaches its time limit, for
    example."""
    world = World()
    world.start_supervisor()
    world.until_step(4)
    world.storage.disk["checkpoints/1.00/step-00000004"] = ""
    world.kill_supervisor()
    for node in world.names:
        world.lose_node(node)
        world.scheduler.down.pop(node)
    world.start_supervisor()
    world.run()
    assert world.storage.cleared == ["checkpoints/1.00/step-00000004"]
    assert [entry.step for entry in world.entries(AttemptStarted)] == [0, 3]


def test_saves_on_record_are_not_kept_in_memory() -> None:
    """1,000 ranks' reports of every save of an attempt of weeks: megabytes, looked through at every
    input."""
    world = World(make_config(steps=30, every_steps=1))
    world.start_supervisor()
    world.until(CheckpointCommitted, 25)
    assert world.core is not None
    (generation,) = world.core.view.generations.values()
    assert len(generation.saves) <= 2
