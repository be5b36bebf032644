"""A run that has been started in the virtual world, and how it ended."""

from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World


def a_run(**changes: object) -> World:
    world = World(make_config(**changes))
    world.start_supervisor()
    return world


def code_of(world: World) -> int:
    assert world.finish is not None
    return world.finish.code
