"""No false kill: ten thousand steps on slow nodes, bad links, a sick disk and a scheduler that is
away now and then, and nothing that trains is taken for dead."""

import random
from collections.abc import Callable

import pytest
from opt_logbook.record.events import AttemptStarted, FailureSeen, RunFinished

from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World

EVERY_SECONDS = 20.0
"""Between two disturbances, on average."""


def slow_a_node(world: World, draw: random.Random) -> None:
    """Steps take longer, by less than what a learned timeout grants."""
    node = draw.choice(world.names)
    world.slow[node] = draw.uniform(1.1, 2.9)
    world.plan(draw.choice((3, 10, 60)), lambda world, _: world.slow.pop(node, None))


def cut_a_link(world: World, draw: random.Random) -> None:
    world.cut_link(draw.choice(world.names), draw.choice((0, 1, 2, 4)))


def cut_all_links(world: World, draw: random.Random) -> None:
    for node in world.names:
        world.cut_link(node, draw.choice((0, 1, 2)))


def delay_a_link(world: World, draw: random.Random) -> None:
    agent = world.agents[draw.choice(world.names)]
    agent.delay = draw.uniform(0.1, 3.0)
    world.plan(draw.choice((10, 40)), lambda world, _: setattr(agent, "delay", 0.0))


def stall_the_disk(world: World, draw: random.Random) -> None:
    world.storage.stalled_until = world.now + draw.choice((1, 2, 5))


def lose_the_scheduler(world: World, draw: random.Random) -> None:
    world.scheduler.away_until = world.now + draw.choice((5, 30, 120))


def slow_the_scheduler(world: World, draw: random.Random) -> None:
    world.scheduler.lag_seconds = draw.choice((0, 2, 8))


NOISE: tuple[Callable[[World, random.Random], None], ...] = (
    *(slow_a_node, slow_a_node, cut_a_link, cut_all_links, delay_a_link),
    *(stall_the_disk, lose_the_scheduler, slow_the_scheduler),
)


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.whole)])
def test_no_noise_is_taken_for_a_failure(steps: int) -> None:
    draw = random.Random(0)
    world = World(make_config(steps=steps, every_steps=50, nodes=3, buffer_nodes=1))
    world.start_supervisor()
    disturbances = 0
    while world.finish is None:
        if draw.random() < 1.0 / EVERY_SECONDS:
            draw.choice(NOISE)(world, draw)
            disturbances += 1
        world.second()
        assert world.now < 1000.0 + 6 * steps, world.described()
    assert disturbances > steps / EVERY_SECONDS / 2
    assert world.events(FailureSeen) == []
    assert len(world.events(AttemptStarted)) == 1
    assert isinstance(world.journal[-1].event, RunFinished)
    assert world.entries(RunFinished)[-1].step == steps
