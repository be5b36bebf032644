"""SIGKILL waits for a process that hangs in the kernel, on a dead file server for example. The run
must not."""

from opt_logbook.record.events import AttemptEnded, IncidentDiagnosed, NodePromoted

from opt_train.protocol.exits import DONE
from opt_train.simulation.world import World
from opt_train.supervisor.effects import FenceNode


def test_a_rank_that_sigkill_does_not_end_does_not_hold_the_run_for_ever() -> None:
    """Its agent is well and takes every kill; without a limit the supervisor repeats them until
    somebody comes."""
    world = World()
    world.start_supervisor()
    world.until_step(4)
    world.agents["n1"].unkillable = True
    world.kill_rank(0)
    world.run()
    assert next(effect for effect in world.effects if isinstance(effect, FenceNode)) == FenceNode(
        "n1"
    )
    found = world.events(IncidentDiagnosed)[0]
    assert (found.cause, found.node) == ("killed", "n0"), (
        "the node that was slow to die is not what began it"
    )
    assert [promoted.replaces for promoted in world.events(NodePromoted)] == ["n1"]
    assert [ended.outcome for ended in world.events(AttemptEnded)] == ["failed", "finished"]
    assert world.finish is not None
    assert world.finish.code == DONE
