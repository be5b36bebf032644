"""What can go wrong in the simulated world: each fault is a function that a seed calls at a
second."""

import random
from functools import partial

from opt_train.protocol.interventions import INTERVENE, ROLL_BACK
from opt_train.run.hold import HOLD, RESUME
from opt_train.run.state import NODES_END
from opt_train.simulation import holds, machines
from opt_train.simulation.world import Disaster, World
from opt_train.supervisor.inputs import InboxReceived

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
LOWERED = 0.5
"""How often the learning rate is changed with a rollback."""


# Ranks --------------------------------------------------------------------------------------------


def kill_a_rank(world: World, draw: random.Random) -> None:
    world.kill_rank(draw.randrange(world.config.world_size))


def crash_a_rank(world: World, draw: random.Random) -> None:
    world.kill_rank(draw.randrange(world.config.world_size), code=1, text=draw.choice(CRASHES))


def poison_a_step(world: World, draw: random.Random) -> None:
    """Every attempt crashes at the same step, whoever runs it."""
    world.poison = (draw.randrange(world.config.train.steps), draw.choice(CRASHES))


def stop_a_rank(world: World, draw: random.Random) -> None:
    world.stop_rank(draw.randrange(world.config.world_size))


def hang_a_rank(world: World, draw: random.Random) -> None:
    """In its data loader, say: the kernel shows nothing."""
    found = world.find(draw.randrange(world.config.world_size))
    if found is not None and found[1].rank is not None:
        rank = found[1].rank
        rank.stuck, rank.phase, rank.since = True, "data", world.now


def hang_a_rank_in_the_kernel(world: World, draw: random.Random) -> None:
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None:
        agent.unkillable = True


# Nodes --------------------------------------------------------------------------------------------


def lose_a_node(world: World, draw: random.Random) -> None:
    world.lose_node(draw.choice(world.names))


def lose_a_domain(world: World, draw: random.Random) -> None:
    """A rack loses its power, one node a second."""
    # OPT-175B lost five hosts at once: the incident at hand is not over when the next node goes.
    for k, node in enumerate(_domain(world, draw)):
        world.plan(k, partial(_lose, node=node))


def find_a_node_unfit(world: World, draw: random.Random) -> None:
    node, (cause, detail, permanent) = draw.choice(world.names), draw.choice(FOUND)
    world.publish_finding(node, cause, detail, permanent)


def find_a_domain_unfit(world: World, draw: random.Random) -> None:
    """Too hot, all of them."""
    # Every door by which a node comes to train is asked at once whether it is fit.
    for node in _domain(world, draw):
        world.publish_finding(node, "gpu_ecc", "uncontained")


def slow_a_node(world: World, draw: random.Random) -> None:
    # Within what a learned timeout grants, and beyond it: the one must not be killed, the other is
    # no different from a hang for whoever waits.
    node = draw.choice(world.names)
    world.slow[node] = draw.choice((1.5, 3.0, 6.0))
    world.plan(draw.choice((10, 60)), lambda world, _: world.slow.pop(node, None))


def drain_a_node(world: World, draw: random.Random) -> None:
    world.scheduler.draining[draw.choice(world.names)] = "maintenance"


# Links --------------------------------------------------------------------------------------------


def cut_a_link(world: World, draw: random.Random) -> None:
    world.cut_link(draw.choice(world.names), draw.choice((1, 2, 6, 30)))


def cut_all_links(world: World, draw: random.Random) -> None:
    seconds = draw.choice((1, 4, 20))
    for node in world.names:
        world.cut_link(node, seconds)


def send_everything_again(world: World, draw: random.Random) -> None:
    """A link that drops for a moment makes an agent send everything again."""
    for node in world.names:
        world.cut_link(node, 0)


def cut_a_node_off(world: World, draw: random.Random) -> None:
    """For less or longer than either end waits, and than the scheduler's patience."""
    # Agents wait for 15 s, the supervisor for 30, and the scheduler calls it down after 15: between
    # any two of them lies another order in which the three notice.
    machines.cut_off(world, draw.choice(world.names), draw.choice((2, 8, 20, 40, 100)))


def cut_a_domain_off(world: World, draw: random.Random) -> None:
    seconds = draw.choice((4, 20, 60))
    for node in _domain(world, draw):
        machines.cut_off(world, node, seconds)


def flap_a_node(world: World, draw: random.Random) -> None:
    """Its cable is loose."""
    node = draw.choice(world.names)
    for at in range(0, 60, draw.choice((6, 10))):
        # A link that resets and one that only waits are two faults: the first costs what was on its
        # way, the second nothing but time.
        seconds, cuts = draw.randrange(1, 5), draw.random() < 0.5
        world.plan(at, partial(_flap, node=node, seconds=seconds, cuts=cuts))


def delay_a_link(world: World, draw: random.Random) -> None:
    """What it carries comes seconds late, in order; other nodes overtake it."""
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None:
        agent.delay = draw.choice((1.0, 3.0, 7.0))
        world.plan(draw.choice((10, 40)), lambda world, _: setattr(agent, "delay", 0.0))


def freeze_an_agent(world: World, draw: random.Random) -> None:
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None:
        # Its kernel keeps the connection open, or the process that is stopped had lost it before.
        if draw.random() < 0.5:
            world.cut_link(agent.node, 0)
        agent.frozen = True


# Disks --------------------------------------------------------------------------------------------


def spoil_a_checkpoint(world: World, draw: random.Random) -> None:
    disk = world.storage.disk
    if disk:
        disk[draw.choice(sorted(disk)[-2:])] = "rank0.safetensors has another sha256"


def flip_a_bit(world: World, draw: random.Random) -> None:
    """Names and sizes are right: only the ranks, which read the bytes, can see it."""
    # Only the newest two: an older one would hardly ever be read.
    disk = world.storage.disk
    if disk:
        world.storage.flipped[draw.choice(sorted(disk)[-2:])] = "rank0.safetensors: bad sha256"


def spoil_what_is_held(world: World, draw: random.Random) -> None:
    agent = world.agents.get(draw.choice(world.names))
    if agent is not None and agent.held:
        path = draw.choice(sorted(agent.held))
        agent.spoiled.add((path, draw.choice(sorted(agent.held[path]))))


def fail_a_commit(world: World, draw: random.Random) -> None:
    world.storage.fail_commits = draw.choice((-1, 1, 2))


def fill_the_disk(world: World, draw: random.Random) -> None:
    # The journal lies on it too: decisions wait, and ranks train on without a journal.
    world.storage.full_until = world.now + draw.choice((3, 15, 60))


def stall_the_disk(world: World, draw: random.Random) -> None:
    # NFS that fails over answers after minutes, and then everything at once.
    world.storage.stalled_until = world.now + draw.choice((2, 10, 30, 90))


# Supervisor and scheduler -------------------------------------------------------------------------


def kill_the_supervisor(world: World, draw: random.Random) -> None:
    """At an effect boundary: after some more effects, wherever that is."""
    # Between two effects lies every state of journal and world that a crash can leave.
    if world.core is not None and world.lives is None:
        world.lives = draw.randrange(12)


def cut_the_supervisor_off(world: World, draw: random.Random) -> None:
    """Its host is out of the network: no agent reaches it, and it asks the scheduler in vain."""
    # Shorter than the agents' lease, and longer: then they end their ranks, and the run is found at
    # rest.
    seconds = draw.choice((5, 20, 60))
    world.refuses_links = True
    world.scheduler.away_until = world.now + seconds
    for node in world.names:
        world.cut_link(node, seconds)
    world.plan(seconds, lambda world, _: setattr(world, "refuses_links", False))


def lose_the_scheduler(world: World, draw: random.Random) -> None:
    # slurmctld restarts: what it cannot say now says nothing of the nodes.
    world.scheduler.away_until = world.now + draw.choice((5, 30, 120))


def slow_the_scheduler(world: World, draw: random.Random) -> None:
    world.scheduler.lag_seconds = draw.choice((2, 8, 20))
    world.scheduler.start_seconds = draw.choice((2.0, 8.0, 30.0))


def ask_to_stop(world: World, draw: random.Random) -> None:
    world.ask_stop(draw.choice(("a person", "SIGTERM", "SIGINT")))


def hold_a_failing_run(world: World, draw: random.Random) -> None:
    # Before, while and after the ranks die: each finds the run in another stage.
    kill_a_rank(world, draw)
    world.plan(draw.randrange(5), hold_the_run)


def hold_the_run(world: World, draw: random.Random) -> None:
    """A person does, and resumes it while it saves, when it rests, or never."""
    holds.ask(world, HOLD)
    seconds = draw.choice((0, 1, 3, 20, 90))
    if seconds:
        world.plan(seconds, resume_the_run)


def resume_the_run(world: World, draw: random.Random) -> None:
    holds.ask(world, RESUME)
    world.resumed = True


def roll_the_run_back(world: World, draw: random.Random) -> None:
    """A person does, by a few steps, and lowers the learning rate perhaps."""
    newest = max((group.step for group in world.groups.values()), default=0)
    changes = {ROLL_BACK: float(max(1, newest - draw.randrange(4)))}
    if draw.random() < LOWERED:
        changes["lr_scale"] = 0.5
    asked = {"kind": INTERVENE, "by": "a person", "why": "it climbs", "changes": changes}
    world.feed(InboxReceived(asked))


def end_the_time_of_the_nodes(world: World, draw: random.Random) -> None:
    """The scheduler takes them back: it says so, and does it whether the run has saved or not."""
    # 40 s are enough for a save in this world, if nothing else goes wrong.
    world.ask_stop(NODES_END)
    names = world.names
    world.plan(40, lambda world, _: _take_back(world, names))


FAULTS: tuple[tuple[Disaster, int], ...] = (
    (kill_a_rank, 5),
    (crash_a_rank, 3),
    (poison_a_step, 1),
    (stop_a_rank, 2),
    (hang_a_rank, 2),
    (hang_a_rank_in_the_kernel, 1),
    (lose_a_node, 4),
    (lose_a_domain, 1),
    (find_a_node_unfit, 2),
    (find_a_domain_unfit, 1),
    (slow_a_node, 2),
    (drain_a_node, 2),
    (cut_a_link, 4),
    (cut_all_links, 1),
    (send_everything_again, 2),
    (cut_a_node_off, 4),
    (cut_a_domain_off, 1),
    (flap_a_node, 1),
    (delay_a_link, 3),
    (freeze_an_agent, 1),
    (spoil_a_checkpoint, 2),
    (flip_a_bit, 1),
    (spoil_what_is_held, 2),
    (fail_a_commit, 2),
    (fill_the_disk, 2),
    (stall_the_disk, 3),
    (kill_the_supervisor, 8),
    (cut_the_supervisor_off, 1),
    (lose_the_scheduler, 2),
    (slow_the_scheduler, 2),
    (ask_to_stop, 1),
    (hold_the_run, 1),
    (hold_a_failing_run, 1),
    (roll_the_run_back, 8),
    (end_the_time_of_the_nodes, 1),
)
"""(Fault, how often it is drawn against the others)."""

STOPS: tuple[Disaster, ...] = (ask_to_stop, hold_the_run, end_the_time_of_the_nodes)


def _domain(world: World, draw: random.Random) -> tuple[str, ...]:
    """The nodes of one failure domain."""
    size = world.config.cluster.nodes_per_domain
    first = draw.randrange(0, len(world.names), size)
    return world.names[first : first + size]


def _lose(world: World, draw: random.Random, node: str) -> None:
    world.lose_node(node)


def _flap(world: World, draw: random.Random, node: str, seconds: float, cuts: bool) -> None:
    if cuts:
        world.cut_link(node, seconds)
    else:
        machines.cut_off(world, node, seconds)


def _take_back(world: World, names: tuple[str, ...]) -> None:
    # A run that has asked for others by now keeps those: they are another allocation.
    if world.replayed.stopped_by != NODES_END:
        for node in names:
            world.lose_node(node, "its time is over")
        world.scheduler.taken_back.update(names)
