"""A person's change of training keys, as the core carries it out."""

from opt_logbook.record.events import AttemptStarted, LineageOpened, RunFinished

from opt_train.protocol.exits import DONE
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.supervisor.effects import Show


def test_a_finished_run_goes_on_under_a_new_lineage() -> None:
    """`train.steps=18 lineage=new` on a finished run must train on, not say "finished" once more
    and exit with 0."""
    world = World(make_config(steps=9))
    world.start_supervisor()
    world.run()
    world.config = make_config(steps=18)
    world.start_supervisor("c1", opens_lineage=True, lineage_difference=("train.steps: 9 -> 18",))
    world.run()
    assert world.events(LineageOpened)[-1] == LineageOpened(2, "c1", ("train.steps: 9 -> 18",))
    newest = world.entries(AttemptStarted)[-1]
    assert (newest.attempt, newest.step, newest.event.parent) == ("2.00", 9, "1.00")
    assert [entry.step for entry in world.entries(RunFinished)] == [9, 18]
    assert [effect.steps for effect in world.effects if isinstance(effect, Show)][-1] == 18, (
        "steps of the configuration"
    )
    assert world.finish is not None
    assert world.finish.code == DONE


def test_other_code_under_the_same_configuration_is_a_lineage_of_its_own() -> None:
    """Ranks that train with the old code must not be adopted, nor their steps be told as the new
    code's."""
    world = World(make_config(steps=9))
    world.start_supervisor()
    world.until_step(4)
    world.kill_supervisor()
    world.second()
    world.start_supervisor(
        "c0", opens_lineage=True, lineage_difference=("torch: 2.12.0 -> 2.13.0",)
    )
    world.run()
    assert world.events(LineageOpened)[1:] == [LineageOpened(2, "c0", ("torch: 2.12.0 -> 2.13.0",))]
    newest = world.entries(AttemptStarted)[-1]
    assert (newest.attempt, newest.step, newest.event.parent) == ("2.00", 3, "1.00")
    assert world.finish is not None
    assert world.finish.code == DONE
