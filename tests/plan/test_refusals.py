"""A mend that is named must mend: the layout it makes fits, and is not refused in turn."""

import re
from dataclasses import replace

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.plan.plan import Plan, plan_of
from opt_train.plan.refusals import refusals
from opt_train.plan.throughput import GPUS, OPT_MFU
from tests.plan.presets import recipe


def with_memory(config: RunConfig, memory_gb: float) -> Plan:
    return plan_of(config, replace(GPUS["A100"], memory_gb=memory_gb), OPT_MFU)


def named(sentence: str) -> list[list[str]]:
    """The overrides of each mend that `sentence` names."""
    return [mend.split() for mend in re.findall(r"((?:[a-z_]+\.[a-z_]+=\S+ )+)\(", sentence)]


@pytest.mark.parametrize(
    ("size", "overrides", "memory_gb"),
    [
        ("6.7b", ("parallel.activation_checkpointing=none", "parallel.replicate=128"), 12),
        ("30b", ("cluster.nodes=63", "train.micro_batch=5", "parallel.accumulate=whole"), 40),
    ],
    ids=[
        "copies given up and blocks computed again",
        "no nodes over which 2,048 sequences pad more than a tenth",
    ],
)
def test_a_mend_fits_and_does_not_idle(
    size: str, overrides: tuple[str, ...], memory_gb: float
) -> None:
    (sentence,) = refusals(with_memory(recipe(size, *overrides), memory_gb), allow_idle=False)
    assert named(sentence), sentence
    for mend in named(sentence):
        assert (
            refusals(with_memory(recipe(size, *overrides, *mend), memory_gb), allow_idle=False)
            == []
        ), mend


@pytest.mark.parametrize(("tensor", "mend"), [(4, "a larger one, or GPUs"), (8, "use GPUs")])
def test_a_tensor_group_as_large_as_a_node_is_not_told_to_grow(tensor: int, mend: str) -> None:
    tiny = with_memory(recipe("175b", f"parallel.tensor={tensor}", "train.micro_batch=1"), 0.5)
    (sentence,) = refusals(tiny, allow_idle=True)
    assert mend in sentence
