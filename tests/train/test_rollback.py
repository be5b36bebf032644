"""A rollback in place, on real ranks: the same bits as without the steps that were given up."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config.run_config import RunConfig
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.exits import RANK_UNSTABLE
from opt_train.protocol.facts import InForce, OrderObeyed, Phase, Probed, RolledBack
from opt_train.protocol.orders import (
    PROBE_BATCHES,
    LedgerEntry,
    RollBack,
    ScaleEmbeddingGradient,
    ScaleLr,
    SetLossScale,
    SkipSamples,
)
from opt_train.train.validation import odd_ones
from tests.train.rig import World, tensors_in, tiny_config

STEPS, EVERY = 40, 5
FP16 = PrecisionConfig(compute="fp16", loss_scale_window_steps=8)


def make_config(folder: Path, **changes: Any) -> RunConfig:
    config = tiny_config(folder, steps=STEPS)
    checkpoint = CheckpointConfig(every_steps=STEPS, memory_every_steps=EVERY, memory_keep=3)
    return replace(config, checkpoint=checkpoint, **changes)


def saved(folder: Path, attempt: str) -> dict[tuple[str, str], str]:
    """The tensors that a run came to."""
    return tensors_in(folder / "run" / "checkpoints" / attempt / f"step-{STEPS:08d}")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="fsdp"),
        pytest.param({"parallel": ParallelConfig(tensor=2)}, id="tensor", marks=pytest.mark.slow),
        pytest.param({"precision": FP16}, id="fp16"),
    ],
)
def test_what_is_given_up_leaves_no_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Twice, the second time to a snapshot of the attempt before; with another learning rate and
    other data from there on."""
    config = make_config(tmp_path, **changes)
    first = RollBack(1, "it climbs", 15, "1.01", 2, (ScaleLr(2, "", 0.5), SkipSamples(3, "", 16)))
    scales = (SetLossScale(6, "", 64.0, 2.0**-3), ScaleEmbeddingGradient(7, "", 0.5))
    changes = (ScaleLr(5, "", 0.8), *scales)
    # What the data looks like from there is measured, and changes nothing.
    second = RollBack(4, "it climbs again", 10, "1.02", 3, changes, (80, 4000))
    rolled, straight = tmp_path / "rolled", tmp_path / "straight"
    rolled.mkdir()
    straight.mkdir()
    with World(rolled, config) as world:
        world.begin()
        world.wait_for_step(22)
        world.ranks[0].send(first)
        world.wait(lambda: bool(world.ranks[0].published(RolledBack)), "the rollback")
        world.ranks[0].send(second)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        for rank in world.ranks:
            assert [(f.step, f.attempt, f.generation) for f in rank.published(RolledBack)] == [
                (15, "1.01", 2),
                (10, "1.02", 3),
            ]
            rates = [fact.values["lr"] for fact in rank.published(InForce)]
            steps = [fact.values["step"] for fact in rank.published(InForce)]
            assert steps == [0, 15, 10]
        obeyed = [fact.number for fact in world.ranks[0].published(OrderObeyed)]
        assert obeyed == [1, 4]
        [probed] = world.ranks[0].published(Probed)
        assert (probed.order, probed.step, probed.places) == (4, 10, (80, 4000))
        assert not world.ranks[1].published(Probed)
        lines = [dict(fact.line) for fact in world.ranks[0].facts if hasattr(fact, "line")]
    assert rates[1] != rates[2]
    assert {line["attempt"] for line in lines} == {"1.00", "1.01", "1.02"}
    for attempt, begins in (("1.00", 1), ("1.01", 16), ("1.02", 11)):
        numbers = [line["step"] for line in lines if line["attempt"] == attempt]
        assert numbers == list(range(begins, begins + len(numbers)))
    ledger = (
        LedgerEntry(15, first.changes[0]),
        LedgerEntry(15, first.changes[1]),
        *(LedgerEntry(10, change) for change in second.changes),
    )
    with World(straight, config) as world:
        world.begin(ledger=ledger, order_number=7)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        undisturbed = world.ranks[0].metrics
    assert saved(rolled, "1.02") == saved(straight, "1.00")
    for line in lines:
        if line["attempt"] == "1.02":
            other = undisturbed[line["step"]]
            for key in ("loss", "grad_norm", "lr", "samples", "tokens", "updates", "loss_scale"):
                assert line[key] == other[key], (key, line["step"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="fsdp"),
        pytest.param({"parallel": ParallelConfig(tensor=2)}, id="tensor", marks=pytest.mark.slow),
        pytest.param({"precision": FP16}, id="fp16", marks=pytest.mark.slow),
    ],
)
def test_what_a_probe_says_of_data_is_what_training_then_finds(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Trained on without a learning rate, the state that was gone back to has those very losses."""
    config = make_config(tmp_path, **changes)
    config = replace(config, model=replace(config.model, dropout=0.0))
    batch, still = config.train.global_batch, ScaleLr(2, "", 1e-12)
    places = (10 * batch, 22 * batch, 11 * batch)
    with World(tmp_path, config) as world:
        world.begin()
        world.wait_for_step(18)
        world.ranks[0].send(RollBack(1, "what is it", 10, "1.01", 2, (still,), places))
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        [probed] = world.ranks[0].published(Probed)
        lines = [dict(fact.line) for fact in world.ranks[0].facts if hasattr(fact, "line")]
        phases = [(f.phase, f.step) for f in world.ranks[1].published(Phase)]
    assert ("evaluation", 10) in phases, "whoever watches for hangs knows what takes so long"
    losses = {line["samples"]: line["loss"] for line in lines if line["attempt"] == "1.01"}
    for place, loss in zip(places, probed.losses, strict=True):
        trained = [losses[place + batch * k] for k in range(1, PROBE_BATCHES + 1)]
        assert loss == pytest.approx(sum(trained) / PROBE_BATCHES, rel=1e-3)
    assert len({round(loss, 4) for loss in probed.losses}) == len(places)
    assert probed.odd_ranks == (), "all compute the same from the same"


def test_a_device_that_computes_otherwise_than_the_others_is_told_by_the_probe(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path)
    config = replace(config, train=replace(config.train, steps=2))
    with World(tmp_path, config, 3, "tests.train.odd_rank") as world:
        world.begin(order_number=3, probe=(80, 4000), probe_order=3)
        assert [leaving.code for leaving in world.finish()] == [0, 0, 0], world.logs()
        [probed] = world.ranks[0].published(Probed)
    assert probed.odd_ranks == (1,)
    assert odd_ones([1.0, 1.0, math.nan]) == (2,)
    assert odd_ones([math.nan] * 3) == ()
    assert odd_ones([0.0, -0.0, 0.0]) == (1,)
    assert odd_ones([1.0, 2.0]) == (0, 1), "of two nobody knows who is right"


def test_ranks_that_begin_with_a_probe_train_as_those_that_begin_without(tmp_path: Path) -> None:
    """It is their first forward pass: what that sets up must not be what training then goes by."""
    config = replace(make_config(tmp_path), train=replace(make_config(tmp_path).train, steps=8))
    ends = []
    for name, changes in (("with", {"probe": (80, 4000), "probe_order": 3}), ("without", {})):
        folder = tmp_path / name
        folder.mkdir()
        with World(folder, config) as world:
            world.begin(order_number=3, **changes)
            assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
            said = [(f.order, f.step, f.places) for f in world.ranks[0].published(Probed)]
        assert said == ([(3, 0, (80, 4000))] if changes else [])
        ends.append(tensors_in(folder / "run" / "checkpoints" / "1.00" / "step-00000008"))
    assert ends[0] == ends[1]


def test_the_beginning_is_gone_back_to_as_a_fresh_run_begins(tmp_path: Path) -> None:
    """For a learning rate that was too high from the start."""
    config = make_config(tmp_path, precision=FP16)
    back = RollBack(1, "too high", 0, "1.01", 2, (ScaleLr(2, "", 0.1),))
    rolled, fresh = tmp_path / "rolled", tmp_path / "fresh"
    rolled.mkdir()
    fresh.mkdir()
    with World(rolled, config) as world:
        world.begin()
        world.wait_for_step(7)
        world.ranks[0].send(back)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        assert [f.step for rank in world.ranks for f in rank.published(RolledBack)] == [0, 0]
    with World(fresh, config) as world:
        world.begin(ledger=(LedgerEntry(0, back.changes[0]),), order_number=2)
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
    assert saved(rolled, "1.01") == saved(fresh, "1.00")


def test_ranks_that_have_no_such_snapshot_leave_for_whoever_ordered_it_to_decide(
    tmp_path: Path,
) -> None:
    with World(tmp_path, make_config(tmp_path)) as world:
        world.begin()
        world.wait_for_step(12)
        world.ranks[0].send(RollBack(1, "too far", 3, "1.01", 2))
        leavings = world.finish()
    assert {leaving.code for leaving in leavings} == {RANK_UNSTABLE}
    assert "only 0 of 2 ranks have" in leavings[1].reason
    assert not any(rank.published(OrderObeyed) for rank in world.ranks)
