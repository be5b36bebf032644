"""Random histories: one seed draws a configuration and a list of disasters, and the world runs
until it ends."""

import random
from dataclasses import replace
from typing import Any

from opt_logbook.record.hardware import Offence

from opt_train.clusters.config import KINDS
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.simulation.actors import make_config
from opt_train.simulation.faults import FAULTS, STOPS
from opt_train.simulation.holds import hold_in_force
from opt_train.simulation.invariants import check_end, check_no_orphan
from opt_train.simulation.world import World
from opt_train.stability.config import StabilityConfig

MOST_SECONDS = 3000
"""Virtual seconds in which every history must have ended."""
QUIET_SECONDS = 240
"""As long as nothing is held up, something happens within this: a step, or a line of the
journal."""
CALM_EVERY = 25
AFTERWARDS_SECONDS = 120
"""Longer than any lease and any cut."""
NOBODY_COMES = 0.05
"""How often nobody starts a supervisor again that has died."""
SPOILT = 0.2
"""How often a range of the data is bad, and the supervisor may do something about it."""
ANSWERED = 0.3
"""How often a person answers a question, with nodes in place of those that failed."""


class History:
    """One seed's run. `run` takes it to its end."""

    def __init__(self, seed: int, **changes: Any) -> None:
        """`changes` go to the configuration that the seed draws."""
        self._draw = random.Random(seed)
        draw = self._draw
        config = make_config(
            kind=draw.choice(tuple(KINDS)),
            min_nodes=draw.choice((0, 1)),
            nodes=draw.choice((1, 2, 2, 3)),
            buffer_nodes=draw.choice((0, 1, 2)),
            slots_per_node=draw.choice((1, 1, 2)),
            steps=40 if seed % CALM_EVERY == 0 else draw.choice((4, 8)),
            every_steps=draw.choice((1, 2, 3)),
            memory_every_steps=draw.choice((0, 1, 2)),
            node_every_steps=draw.choice((0, 2)),
            nodes_per_domain=draw.choice((1, 2)),
            return_seconds=random.Random(f"return {seed}").choice((0.0, 5.0)),
            **changes,
        )
        bad = random.Random(f"data {seed}")
        spoils_data = seed % CALM_EVERY != 0 and bad.random() < SPOILT
        if spoils_data:
            stability = StabilityConfig(mode="act", margin_steps=1, horizon_steps=2)
            config = replace(config, stability=stability)
        self.world = World(config)
        if spoils_data:
            first, batch = bad.randrange(config.train.steps), config.train.global_batch
            length = bad.choice((3, 5, 9, 40))
            self.world.data.bad = first * batch, (first + length) * batch
        self.world.heals = draw.random() < 0.2
        self.world.offences = _offences(random.Random(f"offences {seed}"), self.world.names)
        # All in the first half minute: disasters that meet find more than disasters that wait for
        # one another.
        chosen = draw.choices([f for f, _ in FAULTS], [w for _, w in FAULTS], k=draw.randrange(9))
        if seed % CALM_EVERY == 0:
            # Nothing but a stop: it must lose no step.
            chosen, self.world.is_calm = [draw.choice(STOPS)], True
        times = sorted(draw.randrange(2, 24) for _ in chosen)
        self.world.planned = [(1000.0 + at, fault) for at, fault in zip(times, chosen, strict=True)]
        self._back_at = 0.0
        self._moved = 0.0
        self._seen: tuple[int, tuple[int, ...]] = (0, ())
        self._fresh_nodes = 0

    def run(self) -> World:
        """The world at its end.

        Raises:
            AssertionError: something happened that must not, or nothing more happens and it has not
                ended.
        """
        world = self.world
        world.start_supervisor()
        while not self._is_over():
            assert world.now - 1000.0 < MOST_SECONDS, f"no end: {world.described()}"
            self._inject()
            world.second()
            self._check_progress()
        if world.finish is not None:
            check_end(world)
        # Whoever led is gone. Nodes that were cut off come back, and no lease is longer than this.
        world.heals = False
        for _ in range(AFTERWARDS_SECONDS):
            world.second()
        check_no_orphan(world)
        return world

    def _inject(self) -> None:
        world = self.world
        while world.planned and world.now >= world.planned[0][0]:
            world.planned.pop(0)[1](world, self._draw)

    def _is_over(self) -> bool:
        """Whether the run rests for good; else whoever starts it again, starts it again."""
        world, draw = self.world, self._draw
        rests = world.finish is not None or (world.core is None and not world.agents)
        if rests and hold_in_force(world) is not None:
            # Whoever would start it is refused; what is left to come may be the person's resume.
            return not world.planned
        if world.finish is not None:
            if world.finish.code == DONE:
                return True
            if world.resumed:
                world.resumed = False
                world.start_supervisor()
                return False
            asked = world.finish.code == PERSON_MUST_DECIDE and draw.random() < ANSWERED
            if not asked and not world.goes_on_by_itself:
                return True
            if self._fresh_nodes > len(world.names):
                return True  # nobody has nodes without end
            self._replace_failed_nodes()
            world.start_supervisor()
        elif world.core is None:
            if not self._back_at:
                lost = draw.random() < NOBODY_COMES
                self._back_at = float("inf") if lost else world.now + draw.choice((1, 3, 25))
            if world.now >= self._back_at:
                self._back_at = 0.0
                world.start_supervisor()
            return self._back_at == float("inf")
        return False

    def _replace_failed_nodes(self) -> None:
        # As a new allocation would be: what has failed is left out of it, by names unheard of.
        world = self.world
        names = []
        for name in world.names:
            if name in world.known.failed_nodes or name in world.scheduler.draining:
                self._fresh_nodes += 1
                names.append(f"f{self._fresh_nodes}")
            else:
                names.append(name)
        world.names = tuple(names)

    def _check_progress(self) -> None:
        # Steps of any generation count, also of one that nobody leads: what is to be waited for
        # ends by itself.
        world = self.world
        steps = tuple(group.step for group in world.groups.values())
        seen = (len(world.journal), steps)
        if seen != self._seen or world.is_held_up:
            self._moved, self._seen = world.now, seen
        assert world.now - self._moved < QUIET_SECONDS, f"it hangs: {world.described()}"


def _offences(draw: random.Random, names: tuple[str, ...]) -> tuple[Offence, ...]:
    """What other runs have on record of a node or two; mostly nothing."""
    bad = draw.sample(names, k=draw.choice((0, 0, 1, min(2, len(names)))))
    return tuple(
        Offence(1.7e9 - draw.randrange(10**6), "before", node, "gpu_ecc", "uncontained")
        for node in bad
        for _ in range(draw.choice((1, 2, 3)))
    )


def run_history(seed: int) -> World:
    """The world of `seed` at its end. Raises AssertionError for what must not happen."""
    return History(seed).run()
