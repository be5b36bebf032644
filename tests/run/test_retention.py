"""What the rule of retention may never drop, over random histories, and what it may not keep for
ever."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Event,
    LineageOpened,
    RunCreated,
    SupervisorStarted,
    TrainingBegan,
)

from opt_train.config.run_config import RunConfig
from opt_train.run.checkpoint import path_of_save
from opt_train.run.fold import fold
from opt_train.run.retention import dispensable, kept, referred
from opt_train.run.state import RunState
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.supervisor.effects import Effect, RetireCheckpoint

EVERY = 10


@dataclass
class Saved:
    """A checkpoint as this test remembers it."""

    path: str
    step: int
    attempt: str
    time: float
    healthy: bool
    rejected: bool = False


@dataclass
class History:
    """A run's journal, with a memory of its own of what the live chain is."""

    config: RunConfig
    random: random.Random
    state: RunState = field(default_factory=RunState)
    now: float = 1.7e9
    line: list[Saved] = field(default_factory=list)
    """The live chain, kept as a plain list: cut at each restart, added to at each commit."""
    everything: list[Saved] = field(default_factory=list)
    attempt: str = ""
    generation: int = 0
    step: int = 0
    began: bool = False
    start: Saved | None = None

    def tell(self, event: Event, step: int | None = None, attempt: str | None = None) -> None:
        told = Entry(self.now, self.attempt if attempt is None else attempt, step, event)
        self.state = fold(self.state, told)

    def create(self) -> None:
        self.tell(RunCreated("run", 0, "tiny", 1, 1000, 1))
        self.tell(LineageOpened(1, "c0"))
        self.tell(SupervisorStarted(1, "host", 1, "0", resumed=False))
        self.restart()

    def restart(self, rollback: bool = False) -> None:
        """From the newest good one, or from a random one before it."""
        if self.generation:
            self.tell(AttemptEnded(self.generation, "failed"), self.step)
        good = [saved for saved in self.line if not saved.rejected]
        self.start = next(reversed([saved for saved in good if saved.healthy] or good), None)
        # What the supervisor restores is what this test thinks the newest good one is.
        newest = self.state.newest_good()
        assert (newest.path if newest else "") == (self.start.path if self.start else "")
        if rollback and good:
            self.start = self.random.choice(good)
        self.step = self.start.step if self.start else 0
        self.line = [saved for saved in self.line if saved.step <= self.step]
        self.generation += 1
        self.attempt = self.state.next_attempt(1)
        started = AttemptStarted(
            generation=self.generation,
            parent=self.start.attempt if self.start else "",
            checkpoint=self.start.path if self.start else "",
            manifest_sha256="",
            nodes=("n0",),
            buffer=(),
            world_size=1,
            reason="",
            incident=0,
            config_sha256="c0",
            git_commit="",
            git_dirty=False,
            packages={},
            difference=(),
        )
        self.tell(started, self.step)
        self.began = False

    def begin(self) -> None:
        if not self.began:
            self.tell(TrainingBegan(self.generation, 1.0), self.step + 1)
            self.began = True

    def save(self, healthy: bool) -> None:
        self.begin()
        self.step += EVERY
        saved = Saved(
            path_of_save(self.attempt, self.step), self.step, self.attempt, self.now, healthy
        )
        self.tell(CheckpointCommitted(saved.path, "sha", 1, 1, 0.1, healthy), self.step)
        self.line.append(saved)
        self.everything.append(saved)

    def reject(self) -> None:
        """The newest good one does not verify when it is wanted."""
        newest = self.state.newest_good()
        if newest is not None:
            self.tell(CheckpointRejected(newest.path, "damaged"), newest.step, newest.attempt)
            next(saved for saved in self.everything if saved.path == newest.path).rejected = True

    def retire(self) -> list[Saved]:
        gone = [c.path for c in dispensable(self.state, self.config)]
        dropped = [saved for saved in self.everything if saved.path in gone]
        for saved in dropped:
            self.tell(CheckpointRetired(saved.path), saved.step, saved.attempt)
        self.everything = [saved for saved in self.everything if saved.path not in gone]
        self.line = [saved for saved in self.line if saved.path not in gone]
        return dropped

    def events(self, count: int) -> Iterator[None]:
        """One random thing after another; nothing is retired here."""
        for _ in range(count):
            self.now = round(self.now + self.random.expovariate(1 / 900.0), 3)
            kind = self.random.random()
            if kind < 0.7:
                self.save(healthy=self.random.random() > 0.1)
            elif kind < 0.8:
                if len([saved for saved in self.line if not saved.rejected]) > 1:
                    self.reject()
                    self.restart()
            elif kind < 0.95:
                self.restart(rollback=kind > 0.9)
            else:
                self.begin()
            yield


def a_history(seed: int) -> History:
    chance = random.Random(seed)
    config = make_config(
        every_steps=EVERY,
        keep=chance.choice([1, 2, 3, 5]),
        keep_hours=chance.choice([0.0, 0.0, 0.5, 2.0]),
        milestone_every_steps=chance.choice([0, 0, 20, 50, 100]),
    )
    history = History(config, chance)
    history.create()
    return history


@pytest.mark.parametrize("block", range(10))
def test_what_must_stay_stays_and_the_rest_goes(block: int) -> None:
    dropped_in_all = 0
    for seed in range(50 * block, 50 * block + 50):
        history = a_history(seed)
        policy = history.config.checkpoint
        for _ in history.events(60):
            before, before_line = list(history.everything), list(history.line)
            stays = kept(history.state, history.config)
            dropped = history.retire()
            dropped_in_all += len(dropped)
            paths = {saved.path for saved in dropped}
            told = f"seed {seed}, step {history.step} of {history.attempt}: {sorted(paths)}"
            good = [saved for saved in before_line if not saved.rejected]
            milestones = [
                s
                for s in good
                if policy.milestone_every_steps and s.step % policy.milestone_every_steps == 0
            ]
            newest = before[-1].time if before else 0.0
            young = [saved for saved in before if newest - saved.time < 3600.0 * policy.keep_hours]
            sound = [saved for saved in good if saved.healthy][-2:]
            # Never.
            assert not paths & {saved.path for saved in good[-2:]}, (
                f"one of the newest two good ones goes: {told}"
            )
            assert not paths & {saved.path for saved in sound}, (
                f"one of the newest two healthy ones goes: {told}"
            )
            assert not paths & {saved.path for saved in good[-policy.keep :]}, (
                f"keep={policy.keep} is not kept: {told}"
            )
            assert not paths & {saved.path for saved in milestones}, f"a milestone goes: {told}"
            assert not paths & {saved.path for saved in young}, f"a young one goes: {told}"
            if not history.began and history.start is not None:
                assert history.start.path not in paths, (
                    f"the attempt that begins loses its checkpoint: {told}"
                )
            taken = history.state.newest_good()
            assert (taken is None) == (not good), told
            # Nor for ever: once the attempt stands on two of its own, what stays has one of these
            # reasons.
            own = [saved for saved in good if saved.attempt == history.attempt]
            if history.began and len(own) >= 2:
                newest_kept = good[-max(2, policy.keep) :]
                reasons = {s.path for s in (*newest_kept, *sound, *milestones, *young)}
                if len(before) > max(2, policy.keep):
                    assert {saved.path for saved in history.everything} <= reasons, told
            assert stays <= {saved.path for saved in before}, told
            assert dispensable(history.state, history.config) == [], (
                f"it is not done in one go: {told}"
            )
    assert dropped_in_all > 500


def test_a_clock_that_jumps_costs_neither_the_newest_nor_space_for_ever() -> None:
    """Ahead for one save, back for another: age goes wrong for a while, the count and the
    milestones never do."""
    for seed in range(100):
        history = a_history(seed)
        for number, _ in enumerate(history.events(80)):
            true = history.now
            if number in (20, 40):
                history.now += 1e7 if number == 20 else -1e7
                history.save(healthy=True)
                history.now = true
            before_line = list(history.line)
            paths = {saved.path for saved in history.retire()}
            good = [saved for saved in before_line if not saved.rejected]
            assert not paths & {saved.path for saved in good[-2:]}
        history.restart()
        for _ in range(40):
            history.now += 900.0
            history.save(healthy=True)
            history.retire()
        policy = history.config.checkpoint
        milestones = [
            s
            for s in history.line
            if policy.milestone_every_steps and not s.step % policy.milestone_every_steps
        ]
        most = max(2, policy.keep, int(policy.keep_hours * 4)) + len(milestones)
        assert len(history.everything) <= most, f"seed {seed}: {history.everything}"


def test_milestones_and_young_ones_stay_in_a_whole_run() -> None:
    """The supervisor itself, in virtual time: a save is six seconds after the one before."""
    world = World(make_config(steps=30, milestone_every_steps=9))
    world.start_supervisor()
    world.run()
    assert [int(path[-8:]) for path in sorted(world.storage.disk)] == [9, 18, 27, 30]

    world = World(make_config(steps=30, keep_hours=20 / 3600))
    world.start_supervisor()
    world.run()
    assert [int(path[-8:]) for path in sorted(world.storage.disk)] == [21, 24, 27, 30]


def test_a_run_that_rested_for_a_week_loses_nothing_by_it() -> None:
    history = a_history(0)
    history.config = make_config(every_steps=EVERY, keep=2, keep_hours=1.0)
    for _ in range(4):
        history.now += 60.0
        history.save(healthy=True)
    history.now += 7 * 86400.0
    history.restart()
    assert history.retire() == []
    history.save(healthy=True)
    assert [saved.step for saved in history.retire()] == [10, 20, 30]


def test_what_an_attempt_begins_with_is_referred_to_until_its_first_step() -> None:
    history = a_history(0)
    history.config = make_config(every_steps=EVERY, keep=2)
    for _ in range(4):
        history.save(healthy=True)
    history.random.choice = lambda good: good[1]  # type: ignore[method-assign,assignment]
    history.restart(rollback=True)
    assert referred(history.state) == {path_of_save("1.00", 20)}
    for _ in range(2):
        history.save(healthy=True)
    assert referred(history.state) == {path_of_save("1.01", 40)}, "the one a restart would take"


@pytest.mark.parametrize("count", [3, 12])
def test_a_removal_that_a_death_cut_short_is_ended_by_the_next_supervisor(count: int) -> None:
    """A smaller `keep` retires many at once: every one on record is removed, though the first
    supervisor died."""
    world = World(make_config(steps=60, every_steps=1, keep=count + 2))
    world.start_supervisor()
    world.until_step(count + 4)
    world.kill_supervisor()
    world.config = make_config(steps=60, every_steps=1, keep=2)
    left = dict(world.storage.disk)
    carry_out = world.perform

    def but_remove_nothing(effect: Effect) -> None:
        if not isinstance(effect, RetireCheckpoint):
            carry_out(effect)

    # It dies when all is on record and nothing removed.
    world.perform = but_remove_nothing  # type: ignore[method-assign]
    world.start_supervisor()
    world.until(CheckpointRetired, count)
    world.kill_supervisor()
    assert set(left) <= set(world.storage.disk)
    world.perform = carry_out  # type: ignore[method-assign]
    world.start_supervisor()
    world.second()
    on_record = {c.path for c in world.replayed.checkpoints}
    assert not [
        path for path in world.storage.disk if path not in on_record and int(path[-8:]) < count
    ]
