"""`train.deterministic` is really in effect, and an operation that cannot do it is named in a
sentence."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opt_train.protocol.exits import RANK_BAD_CONFIG
from opt_train.protocol.facts import ExitNotice
from opt_train.protocol.framing import Message
from opt_train.train.determinism import be_deterministic, explain
from opt_train.train.orders import NoOrders, StopSignals
from opt_train.train.rank import run_rank
from tests.train.rig import World, begin_alone, tiny_config


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = benchmark


def planted() -> None:
    """An operation of which torch has no deterministic kernel on any device."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_all_switches_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # which cuBLAS is not deterministic under
    torch.backends.cudnn.benchmark = True
    be_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_setting_that_cublas_is_deterministic_under_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    be_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_only_torchs_complaint_is_explained() -> None:
    planted()
    be_deterministic()
    with pytest.raises(RuntimeError) as caught:
        planted()
    assert explain(caught.value) == (
        "train.deterministic=true, but put_ has no deterministic kernel here; set "
        "train.deterministic=false"
    )
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    torch.use_deterministic_algorithms(False)
    assert explain(caught.value) is None


def test_rank_that_meets_such_an_operation_says_so_and_leaves(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    config = replace(config, train=replace(config.train, deterministic=True))
    begin = begin_alone(tmp_path, config)
    facts: list[Message] = []

    def joins(*_: object) -> torch.distributed.ProcessGroup:
        planted()
        raise AssertionError("it is not in effect")

    assert run_rank(begin, facts.append, NoOrders(), StopSignals(), joins) == RANK_BAD_CONFIG
    leaving = facts[-1]
    assert isinstance(leaving, ExitNotice)
    assert (leaving.cause, leaving.reason.split(",")[0]) == ("config", "train.deterministic=true")


def test_trainer_needs_no_other_kernels(tmp_path: Path) -> None:
    """All that a step, a validation and a save do, has deterministic kernels."""
    config = tiny_config(tmp_path, steps=3)
    config = replace(config, train=replace(config.train, deterministic=True))
    with World(tmp_path, config, world_size=1) as world:
        world.begin()
        assert [leaving.code for leaving in world.finish()] == [0]
