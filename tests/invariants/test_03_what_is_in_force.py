"""What ranks report as in effect is `in_force(configuration, ledger, step)`, at the start and after
every restore.

That the supervisor compares it too: tests/supervisor/test_scenarios.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opt_train.checkpoint import manifest
from opt_train.config.run_config import RunConfig
from opt_train.data.order import Cursor
from opt_train.optim.in_force import differences, in_force
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import DONE, RANK_BAD_CONFIG
from opt_train.protocol.facts import ExitNotice, InForce, Metrics
from opt_train.protocol.framing import Message
from opt_train.protocol.orders import LedgerEntry, ScaleEmbeddingGradient, SetLossScale
from opt_train.train import rank, resume
from opt_train.train.orders import NoOrders, StopSignals
from tests.train.rig import World, begin_alone, sha256_of, tiny_config


def test_reported_values_are_those_of_the_configuration(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=6)
    with World(tmp_path, config) as world:
        world.begin()
        world.finish()
        for rank in world.ranks:
            (fact,) = rank.published(InForce)
            assert differences(in_force(config, (), 0), fact.values) == []
            assert fact.values["updates"] == 0
        # Each step's own LR too, not just the first one's.
        rates = {step: line["lr"] for step, line in world.ranks[0].metrics.items()}
        assert rates == {step: in_force(config, (), step - 1)["lr"] for step in range(1, 7)}
        checkpoint = world.commit(6)

    # OPT-175B's runs 12.35 to 12.37: new betas were configured, and the checkpoint's old ones
    # silently used.
    changed = replace(
        config, optim=replace(config.optim, beta1=0.0, eps=1.0, weight_decay=0.0, lr=1e-4, clip=0.3)
    )
    changed = replace(changed, train=replace(config.train, steps=8))
    with World(tmp_path, changed) as world:
        world.begin(attempt="2.00", generation=2, checkpoint=checkpoint)
        world.finish()
        for rank in world.ranks:
            (fact,) = rank.published(InForce)
            assert differences(in_force(changed, (), 6), fact.values) == []
            assert (fact.values["beta1"], fact.values["eps"], fact.values["weight_decay"]) == (
                0.0,
                1.0,
                0.0,
            )
            assert (fact.values["updates"], fact.values["step"], fact.values["samples"]) == (
                6,
                6,
                48,
            )
        assert world.ranks[0].metrics[7]["grad_norm_clipped"] <= 0.3 + 1e-6


def test_wrong_cursor_stops_the_run_and_is_named(tmp_path: Path) -> None:
    """Another batch size after a restore would move the cursor to samples that were seen, or skip
    some."""
    config = tiny_config(tmp_path, steps=2)
    with World(tmp_path, config, world_size=1) as world:
        world.begin()
        world.finish()
        checkpoint = world.commit(2)
    changed = replace(config, train=replace(config.train, steps=4, global_batch=4))
    with World(tmp_path, changed, world_size=1) as world:
        world.begin(attempt="2.00", generation=2, checkpoint=checkpoint)
        (leaving,) = world.finish()
        assert leaving.code == RANK_BAD_CONFIG
        assert "samples: expected 8, in force 16" in leaving.reason
        assert not world.ranks[0].published(Metrics)


# A difference planted in each of the values -------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run in fp16, whose loss scale is state, and its checkpoint after two steps of four."""
    folder = tmp_path_factory.mktemp("saved")
    config = replace(tiny_config(folder, steps=2), precision=PrecisionConfig(compute="fp16"))
    with World(folder, config, world_size=1) as world:
        world.begin()
        world.finish()
        checkpoint = world.commit(2)
    return replace(config, train=replace(config.train, steps=4)), checkpoint


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[..., dist.ProcessGroup]]:
    """Joins a world of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield lambda *_: dist.new_group(backend="gloo")
    dist.destroy_process_group()


Group = dict[str, Any]


def in_groups(change: Callable[[Group], None]) -> Callable[[torch.optim.Optimizer], None]:
    def plant(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            change(group)

    return plant


def one_update_more(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["step"] += 1


def decay_of_a_vector(group: Group) -> None:
    group["weight_decay"] = 0.1


def betas(first: float, second: float) -> Callable[[Group], None]:
    return lambda group: group.update(betas=(first, second))


IN_THE_OPTIMIZER: dict[str, tuple[Callable[[torch.optim.Optimizer], None], str]] = {
    "lr": (in_groups(lambda group: group.update(lr=1.0)), "lr: expected 0.00"),
    "beta1": (in_groups(betas(0.8, 0.95)), "beta1: expected 0.9, in force 0.8"),
    "beta2": (in_groups(betas(0.9, 0.99)), "beta2: expected 0.95, in force 0.99"),
    "eps": (in_groups(lambda group: group.update(eps=1.0)), "eps: expected 1e-08, in force 1.0"),
    "decay": (
        in_groups(lambda group: group.update(weight_decay=0.0)),
        "weight_decay: expected 0.1, in force 0.0",
    ),
    "decay of a vector": (in_groups(decay_of_a_vector), "weight_decay: expected 0.1, in force nan"),
    "optimizer step": (one_update_more, "updates: expected 2, in force 3"),
}


@pytest.mark.parametrize("value", IN_THE_OPTIMIZER)
def test_difference_in_the_optimizer_stops_the_run_and_is_named(
    value: str,
    saved: tuple[RunConfig, Path],
    group: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the restore had let a checkpoint's own values outlive it."""
    plant, named = IN_THE_OPTIMIZER[value]
    load = rank.load

    def load_and_plant(engine: Any, *more: Any) -> None:
        load(engine, *more)
        plant(engine.optimizer)

    monkeypatch.setattr(rank, "load", load_and_plant)
    assert_stopped(saved, group, tmp_path, named)


def test_difference_in_the_loss_scale_stops_the_run_and_is_named(
    saved: tuple[RunConfig, Path], group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it began anew, or came from elsewhere, instead of going on."""

    def load_another(loss_scale: Any, _manifest: manifest.Manifest) -> None:
        loss_scale.scale = loss_scale.scale * 4

    monkeypatch.setattr(rank, "load_loss_scale", load_another)
    assert_stopped(saved, group, tmp_path, "loss_scale: expected 4.0, in force 16.0")


def test_difference_in_the_cursor_stops_the_run_and_is_named(
    saved: tuple[RunConfig, Path], group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if one sample had been read twice."""
    read_state = rank.read_state

    def read_one_back(*arguments: Any) -> Any:
        state = read_state(*arguments)
        state.cursor = Cursor(state.cursor.samples - 1)
        return state

    monkeypatch.setattr(rank, "read_state", read_one_back)
    assert_stopped(saved, group, tmp_path, "samples: expected 16, in force 15")


def test_difference_in_the_clip_stops_the_run_and_is_named(
    saved: tuple[RunConfig, Path], group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the ledger had tightened the clip and the rank had not heard of it: here the
    expectation is what moves."""
    monkeypatch.setattr(
        resume, "in_force", lambda *arguments: {**in_force(*arguments), "clip": 0.3}
    )
    assert_stopped(saved, group, tmp_path, "clip: expected 0.3, in force 1.0")


def test_nothing_planted_stops_nothing(
    saved: tuple[RunConfig, Path], group: Any, tmp_path: Path
) -> None:
    code, facts = go_on(saved, group, tmp_path)
    assert code == DONE
    assert [fact.line["step"] for fact in facts if isinstance(fact, Metrics)] == [3, 4]


def test_scales_that_an_order_sets_at_the_very_step_are_in_force_and_not_the_saved_ones(
    saved: tuple[RunConfig, Path], group: Any, tmp_path: Path
) -> None:
    config, _ = saved
    ledger = (
        LedgerEntry(2, SetLossScale(1, "", 64.0, 0.125, window_steps=3)),
        LedgerEntry(2, ScaleEmbeddingGradient(2, "", 0.5)),
    )
    code, facts = go_on(saved, group, tmp_path, ledger=ledger, order_number=2)
    assert code == DONE
    [fact] = [fact for fact in facts if isinstance(fact, InForce)]
    assert differences(in_force(config, ledger, 2), fact.values) == []
    names = ("loss_scale", "loss_scale_floor", "loss_scale_window_steps", "embedding_gradient")
    assert [fact.values[name] for name in names] == [64.0, 0.125, 3, 0.5]
    lines = [fact.line for fact in facts if isinstance(fact, Metrics)]
    assert [(line["loss_scale"], line["loss_scale_floor"]) for line in lines] == [(64.0, 0.125)] * 2


def assert_stopped(saved: tuple[RunConfig, Path], group: Any, folder: Path, named: str) -> None:
    code, facts = go_on(saved, group, folder)
    leaving = facts[-1]
    assert isinstance(leaving, ExitNotice)
    assert (code, leaving.code, leaving.cause) == (RANK_BAD_CONFIG, RANK_BAD_CONFIG, "config")
    assert named in leaving.reason
    assert leaving.reason.count("expected") == 1, "only what was planted is named"
    assert not [fact for fact in facts if isinstance(fact, Metrics)], "it trained"


def go_on(
    saved: tuple[RunConfig, Path], group: Any, folder: Path, **changes: Any
) -> tuple[int, list[Message]]:
    """Resume from the checkpoint in this process, as the only rank; its exit code and what it
    told."""
    config, checkpoint = saved
    begin: Begin = replace(
        begin_alone(folder, config),
        attempt="2.00",
        generation=2,
        checkpoint=str(checkpoint),
        manifest_sha256=sha256_of(checkpoint / manifest.MANIFEST),
    )
    begin = replace(begin, **changes)
    facts: list[Message] = []
    return rank.run_rank(begin, facts.append, NoOrders(), StopSignals(), group), facts
