"""Invariant 6: whatever is killed, rolled back or spread over other ranks, the weights that a run
ends with have seen each sample of the order once, in the same global batches; and a batch whose
update was skipped is on record."""

import json
import math
import random
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import pytest
import torch
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    Entry,
    Event,
)

from opt_train.config.run_config import RunConfig
from opt_train.data.batches import Batches
from opt_train.data.order import SampleOrder
from opt_train.data.token_stream import TokenStream
from opt_train.parallel.layout import Layout
from opt_train.protocol.commands import Begin
from opt_train.run.fold import fold
from opt_train.run.state import RunState
from opt_train.train.config import TrainConfig
from opt_train.train.state import TrainState
from opt_train.train.stats.metrics import MetricsSource, metrics_line
from opt_train.train.stats.step_stats import StepStats

LIVES = 80
SEQUENCE = 2


@dataclass
class Saved:
    """A checkpoint on the disk."""

    state_json: str
    attempt: str
    batches: int
    """Global batches that its attempt had read by then: known to the test alone, whatever the
    cursor says."""


@dataclass
class Life:
    """One run without its processes: the real data, cursor, state, layout and choice of checkpoint,
    and no model."""

    seed: int
    journal: RunState = field(default_factory=RunState)
    disk: dict[str, Saved] = field(default_factory=dict)
    read: dict[str, list[list[int]]] = field(default_factory=dict)
    """Attempt -> the samples of each global batch, as its ranks read them."""
    parents: dict[str, Saved | None] = field(default_factory=dict)
    lines: dict[tuple[str, int], dict[str, object]] = field(default_factory=dict)
    """(attempt, step) -> metrics line."""
    skipped: set[tuple[str, int]] = field(default_factory=set)
    worlds: set[int] = field(default_factory=set)
    rollbacks: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.steps = self.draw.randint(8, 24)
        self.global_batch = self.draw.randint(1, 13)
        self.samples = self.draw.randint(3, 90)
        tokens = np.arange(self.samples * SEQUENCE + 1, dtype=np.uint16)
        shards = np.split(tokens, sorted(self.draw.sample(range(1, len(tokens)), 2)))
        self.batches = Batches(TokenStream(shards), SEQUENCE, self.global_batch, self.seed)
        self.config = RunConfig(train=TrainConfig(steps=self.steps, global_batch=self.global_batch))

    def live(self) -> "Life":
        """From the first attempt to the one that does the last step."""
        for number in range(self.draw.randint(1, 7)):
            self.attempt(number, self.draw.randint(1, self.steps - 1))
            while (
                len(good := [c for c in self.journal.chain() if not c.rejected]) > 1
                and self.draw.random() < 0.3
            ):
                self.note(
                    CheckpointRejected(good[-1].path, "a wrong checksum"),
                    good[-1].attempt,
                    good[-1].step,
                )
                self.rollbacks += 1
        self.attempt(len(self.read), self.steps)
        return self

    def attempt(self, number: int, last: int) -> None:
        """Ranks that restore what the journal says, train up to `last`, wherever they begin, and
        die."""
        restored = self.journal.newest_good()
        saved = self.disk[restored.path] if restored else None
        state = TrainState.from_json(json.loads(saved.state_json)) if saved else TrainState()
        name = f"1.{number:02d}"
        layout = Layout(
            self.draw.randint(1, 3), self.draw.randint(1, 4), self.draw.choice((1, 1, 2))
        )
        self.worlds.add(layout.data_world)
        self.parents[name], self.read[name] = saved, []
        parent, path = (restored.attempt, restored.path) if restored else ("", "")
        started = AttemptStarted(number + 1, parent, path, "", (), (), layout.world_size, "")
        self.note(started, name, state.step)

        micro_batch, every = self.draw.randint(1, 5), self.draw.randint(1, 6)
        under_way: list[StepStats] = []
        while state.step < last:
            self.receive_stats(name, state, under_way, before=state.step - 1)
            under_way.append(self.step(name, state, layout, micro_batch))
            if state.step % every == 0 or self.draw.random() < 0.05:  # as due, or as ordered
                self.receive_stats(name, state, under_way, before=state.step)
                self.save(name, state)
        self.receive_stats(name, state, under_way, before=state.step)
        self.note(AttemptEnded(number + 1, "failed"), name, state.step)

    def step(self, name: str, state: TrainState, layout: Layout, micro_batch: int) -> StepStats:
        shares: dict[int, list[int]] = {}
        for rank in range(layout.world_size):
            place = layout.data_rank(rank)
            read = self.batches.at(
                state.cursor, data_rank=place, data_world=layout.data_world, micro_batch=micro_batch
            )
            mine = [
                int(tokens[0]) // SEQUENCE
                for batch in read
                for tokens, weight in zip(batch.tokens, batch.weights, strict=True)
                if weight
            ]
            assert shares.setdefault(place, mine) == mine, (
                "the ranks of a tensor group read the same"
            )
        self.read[name].append(
            [sample for place in range(layout.data_world) for sample in shares[place]]
        )
        skips = self.draw.random() < 0.15
        if skips:
            self.skipped.add((name, state.step + 1))
        tokens = len(self.read[name][-1]) * SEQUENCE
        stats = StepStats(
            step=state.step,
            loss_sum=math.nan if skips else 3.0 * tokens,
            tokens=tokens,
            activation_squares=1.0 * tokens,
            grad_norm=1.0,
            clipped_norm=1.0,
            skipping_ranks=int(skips),
            step_seconds=0.1,
            memory_bytes=1,
        )
        # What `train.step.take_step` does behind the update.
        state.step += 1
        state.cursor = self.batches.after(state.cursor)
        return stats

    def receive_stats(
        self, name: str, state: TrainState, under_way: list[StepStats], before: int
    ) -> None:
        """As `StatsReceiver.receive`: stats arrive a step late, so a killed rank has not counted
        its last ones."""
        while under_way and under_way[0].step < before:
            stats = under_way.pop(0)
            state.absorb(stats)
            begin = Begin(1, name, "n0", 0, 0, 1, 0, "", 0, "", "", "", None, None, 0)
            source = MetricsSource(
                config=self.config,
                begin=begin,
                state=state,
                stats=stats,
                learning_rate=1e-3,
                samples=(stats.step + 1) * self.config.train.global_batch,
                device=torch.device("cpu"),
            )
            self.lines[name, stats.step + 1] = metrics_line(source)

    def save(self, name: str, state: TrainState) -> None:
        if self.draw.random() < 0.2:
            return  # it failed, or the ranks died before its manifest was there
        path = f"checkpoints/{name}/step-{state.step:08d}"
        self.disk[path] = Saved(
            json.dumps(state.to_json(), allow_nan=False), name, len(self.read[name])
        )
        healthy = bool(state.to_json()["healthy"])
        self.note(CheckpointCommitted(path, "", 1, 1, 0.1, healthy), name, state.step)

    def note(self, event: Event, attempt: str, step: int) -> None:
        self.journal = fold(self.journal, Entry(1.0, attempt, step, event))

    @cached_property
    def chain(self) -> list[tuple[str, list[int]]]:
        """(attempt, samples) of every global batch that the last weights descend from."""
        name, count = max(self.read), len(self.read[max(self.read)])
        batches: list[tuple[str, list[int]]] = []
        while True:
            batches = [(name, samples) for samples in self.read[name][:count]] + batches
            parent = self.parents[name]
            if parent is None:
                return batches
            name, count = parent.attempt, parent.batches


@pytest.fixture(scope="module")
def lives() -> list[Life]:
    return [Life(seed).live() for seed in range(LIVES)]


def test_the_live_chain_is_the_order_in_its_global_batches(lives: list[Life]) -> None:
    for life in lives:
        order = SampleOrder(life.samples, life.seed)
        expected = [
            [order.index(step * life.global_batch + row) for row in range(life.global_batch)]
            for step in range(life.steps)
        ]
        assert [samples for _, samples in life.chain] == expected, f"life {life.seed}"


def test_no_sample_is_read_twice_or_missed_in_an_epoch(lives: list[Life]) -> None:
    """Said without the order: of every epoch that was finished each sample once, of the last one
    none twice."""
    for life in lives:
        read = list(chain.from_iterable(samples for _, samples in life.chain))
        assert len(read) == life.steps * life.global_batch
        for first in range(0, len(read), life.samples):
            epoch = read[first : first + life.samples]
            assert len(set(epoch)) == len(epoch), f"life {life.seed}"
            assert set(epoch) <= set(range(life.samples))


def test_what_was_counted_is_what_was_read_and_every_skip_is_on_record(lives: list[Life]) -> None:
    """Counters that forget the words a killed rank had not heard would drift from the cursor with
    every restart."""
    for life in lives:
        updates = 0
        for step, (attempt, _) in enumerate(life.chain, start=1):
            line = life.lines[attempt, step]
            updates += (attempt, step) not in life.skipped
            samples = step * life.global_batch
            assert (line["step"], line["samples"], line["tokens"]) == (
                step,
                samples,
                samples * SEQUENCE,
            )
            assert (line["updates"], line["skipped"]) == (
                updates,
                (attempt, step) in life.skipped,
            ), f"life {life.seed}"


def test_these_lives_are_troubled(lives: list[Life]) -> None:
    """Runs that are never broken, rolled back or moved would show nothing."""
    done_again = sum(sum(map(len, life.read.values())) - life.steps for life in lives)
    assert done_again > 3 * LIVES
    assert sum(life.rollbacks for life in lives) > LIVES / 2
    assert sum(len(life.worlds) > 1 for life in lives) > LIVES / 2
    assert sum(len({attempt for attempt, _ in life.chain}) > 2 for life in lives) > LIVES / 3
    assert any(life.steps * life.global_batch > 2 * life.samples for life in lives), (
        "no life has seen a third epoch"
    )
    assert any(max(life.worlds) > life.global_batch for life in lives), (
        "no rank has ever had nothing to read"
    )
