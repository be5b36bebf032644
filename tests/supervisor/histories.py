"""Random histories: one seed draws a configuration and a list of disasters, and the world runs
until it ends."""

import random
from collections.abc import Callable

from opt_train.run.state import TERMINAL
from tests.supervisor.actors import make_config
from tests.supervisor.world import World

MOST_SECONDS = 900
"""Virtual seconds in which every history must have ended."""

CRASHES = (
    "torch.OutOfMemoryError: CUDA out of memory.",
    "ValueError: bad",
    "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus",
)

FOUND = (
    ("gpu_ecc", "uncontained", True),
    ("gpu_ecc", "contained", False),
    ("gpu_ecc", "remap_pending", True),
    ("unknown", "the driver does not answer", True),
)
"""(cause, detail, permanent) of findings."""

Fault = Callable[[World, random.Random], None]


def kill_a_rank(world: World, draw: random.Random) -> None:
    world.kill_rank(draw.randrange(world.config.world_size))


def crash_a_rank(world: World, draw: random.Random) -> None:
    world.kill_rank(draw.randrange(world.config.world_size), code=1, text=draw.choice(CRASHES))


def poison_a_step(world: World, draw: random.Random) -> None:
    """Every attempt crashes at the same step, whoever runs it."""
    world.poison = (draw.randrange(world.config.train.steps), draw.choice(CRASHES))


def stop_a_rank(world: World, draw: random.Random) -> None:
    world.stop_rank(draw.randrange(world.config.world_size))


def lose_a_node(world: World, draw: random.Random) -> None:
    world.lose_node(draw.choice(world.names))


def cut_a_link(world: World, draw: random.Random) -> None:
    world.cut_link(draw.choice(world.names), draw.choice((1, 2, 6, 30)))


def cut_all_links(world: World, draw: random.Random) -> None:
    seconds = draw.choice((1, 4, 20))
    for node in world.names:
        world.cut_link(node, seconds)


def freeze_an_agent(world: World, draw: random.Random) -> None:
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None:
        world.cut_link(agent.node, 0)
        agent.frozen = True


def hang_a_rank_in_the_kernel(world: World, draw: random.Random) -> None:
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None:
        agent.unkillable = True


def spoil_a_checkpoint(world: World, draw: random.Random) -> None:
    if world.disk:
        world.disk[draw.choice(sorted(world.disk)[-2:])] = "rank0.safetensors has another sha256"


def spoil_what_is_held(world: World, draw: random.Random) -> None:
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None and agent.held:
        path = draw.choice(sorted(agent.held))
        agent.spoiled.add((path, draw.choice(sorted(agent.held[path]))))


def fail_a_commit(world: World, draw: random.Random) -> None:
    world.fail_commits = draw.choice((-1, 1, 2))


def kill_the_supervisor(world: World, draw: random.Random) -> None:
    """At an effect boundary: after some more effects, wherever that is."""
    if world.core is not None and world.lives is None:
        world.lives = draw.randrange(12)


def send_everything_again(world: World, draw: random.Random) -> None:
    """A link that drops for a moment makes an agent tell everything again."""
    for node in world.names:
        world.cut_link(node, 0)


def find_a_node_unfit(world: World, draw: random.Random) -> None:
    node, (cause, detail, permanent) = draw.choice(world.names), draw.choice(FOUND)
    world.publish_finding(node, cause, detail, permanent)


def ask_to_stop(world: World, draw: random.Random) -> None:
    world.ask_stop()


FAULTS: tuple[tuple[Fault, int], ...] = (
    (kill_a_rank, 5),
    (crash_a_rank, 2),
    (poison_a_step, 1),
    (stop_a_rank, 2),
    (lose_a_node, 3),
    (cut_a_link, 4),
    (cut_all_links, 1),
    (freeze_an_agent, 1),
    (hang_a_rank_in_the_kernel, 1),
    (spoil_a_checkpoint, 2),
    (spoil_what_is_held, 2),
    (fail_a_commit, 2),
    (kill_the_supervisor, 7),
    (send_everything_again, 2),
    (ask_to_stop, 1),
    (find_a_node_unfit, 2),
)


def run_history(seed: int) -> World:
    """The world of `seed` at its end.

    Raises:
        AssertionError: something happened that must not, or nothing more happens and it has not
            ended.
    """
    draw = random.Random(seed)
    config = make_config(
        nodes=draw.choice((1, 2, 2)),
        buffer_nodes=draw.choice((0, 1, 2)),
        slots_per_node=draw.choice((1, 1, 2)),
        steps=draw.choice((4, 8)),
        every_steps=draw.choice((1, 2, 3)),
        memory_every_steps=draw.choice((0, 1, 2)),
        node_every_steps=draw.choice((0, 2)),
        nodes_per_domain=draw.choice((1, 2)),
    )
    world = World(config, seed)
    world.start_supervisor()
    chosen = draw.choices([f for f, _ in FAULTS], [w for _, w in FAULTS], k=draw.randrange(9))
    due = sorted(
        ((draw.randrange(2, 24), k, fault) for k, fault in enumerate(chosen)),
        key=lambda item: item[:2],
    )
    back_at = 0.0
    began = world.now
    while world.finish is None:
        assert world.now - began < MOST_SECONDS, (
            f"no end: {world.replayed.stage}, {world.kinds()[-8:]}"
        )
        while due and world.now - began >= due[0][0]:
            due.pop(0)[2](world, draw)
        if world.core is None and world.finish is None:
            back_at = back_at or world.now + draw.choice((1, 3, 25))
            if world.now >= back_at:
                back_at = 0.0
                world.start_supervisor()
        world.second()
    check_end(world)
    return world


def check_end(world: World) -> None:
    """What must hold when all is over."""
    state = world.replayed
    assert state.stage in TERMINAL
    assert not state.open_incidents, "every incident is closed"
    assert state.live is None, "no attempt is left open"
    opened = world.kinds().count("failure_seen")
    assert world.kinds().count("incident_closed") == opened, "each incident is closed once"
    budget = world.config.supervisor.restarts_without_progress
    restarts = world.kinds().count("attempt_started")
    commits = world.kinds().count("checkpoint_committed")
    starts = world.kinds().count("supervisor_started")
    assert restarts <= (commits + starts + 1) * (3 * budget + 1), "no restart loop"
    assert world.kinds().count("run_created") == 1
    if state.stage == "finished":
        assert state.furthest_save == world.config.train.steps, (
            "the last weights are in a checkpoint"
        )
