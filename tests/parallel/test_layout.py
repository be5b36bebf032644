"""Degrees of parallelism: what multiplies to the world size, and who reads which data."""

import pytest

from opt_train.parallel.config import ParallelConfig
from opt_train.parallel.layout import Layout
from opt_train.protocol.exits import BadInput


def test_shard_takes_what_the_others_leave() -> None:
    assert Layout.of(ParallelConfig(), 8) == Layout(1, 8, 1)
    assert Layout.of(ParallelConfig(replicate=2), 8) == Layout(2, 4, 1)
    assert Layout.of(ParallelConfig(replicate=2, shard=2, tensor=2), 8).data_world == 4


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(replicate=3),
        ParallelConfig(shard=3),
        ParallelConfig(tensor=3),
        ParallelConfig(replicate=16),
    ],
)
def test_degrees_that_do_not_fit_the_world_are_named(config: ParallelConfig) -> None:
    with pytest.raises(BadInput, match=r"parallel\.replicate.* but the cluster has 8"):
        Layout.of(config, 8)


@pytest.mark.parametrize("key", ["replicate", "shard", "tensor"])
def test_degree_below_one_is_named(key: str) -> None:
    with pytest.raises(BadInput, match=rf"parallel\.{key}=-1 must be at least 1"):
        Layout.of(ParallelConfig(**{key: -1}), 1)


def test_ranks_of_a_tensor_group_read_the_same_samples() -> None:
    layout = Layout(2, 2, 2)
    assert [layout.data_rank(rank) for rank in range(layout.world_size)] == [0, 0, 1, 1, 2, 2, 3, 3]
