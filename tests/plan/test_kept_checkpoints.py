"""The space a run's checkpoints take at its end: counted against the rule of retention itself, save
by save."""

from dataclasses import replace

import pytest

from opt_train.plan.page import page
from opt_train.plan.plan import plan_of
from opt_train.plan.throughput import GPUS
from tests.plan.presets import planned, recipe


def by_hand(steps: int, every: int, keep: int, milestone: int, young: int) -> int:
    """The rule, applied to each save of a run that never left its chain; `young` saves fit into
    `keep_hours`."""
    saves = list(range(every, steps + 1, every))
    newest = set(saves[-max(2, keep, young) :])
    return len(newest | {step for step in saves if milestone and step % milestone == 0})


@pytest.mark.parametrize("keep", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("every", "milestone"), [(500, 0), (500, 500), (500, 1000), (500, 5000), (300, 900)]
)
@pytest.mark.parametrize("hours", [0, 2, 24])
def test_milestones_and_hours_are_counted_as_retention_keeps_them(
    keep: int, every: int, milestone: int, hours: float
) -> None:
    config = recipe(
        "125m",
        f"checkpoint.keep={keep}",
        f"checkpoint.every_steps={every}",
        f"checkpoint.milestone_every_steps={milestone}",
        f"checkpoint.keep_hours={hours}",
    )
    plan = plan_of(config, GPUS["A100"], 0.4)
    seconds = plan.throughput.step_seconds
    assert seconds is not None
    young = sum(k * every * seconds < hours * 3600 for k in range(plan.throughput.steps // every))
    kept = by_hand(plan.throughput.steps, every, keep, milestone, young)
    assert kept <= plan.checkpoint.kept <= kept + 1
    assert plan.checkpoint.kept_bytes == (plan.checkpoint.kept + 1) * plan.checkpoint.bytes


def test_the_plan_says_what_is_kept_and_why() -> None:
    told = page(
        planned(
            recipe("175b", "checkpoint.milestone_every_steps=10000", "checkpoint.keep_hours=12")
        )
    )
    assert "that are kept and the next one" in told
    assert "milestones, one every 10,000 steps" in told
    assert "those of the last 12 hours at the pace planned" in told


def test_more_hours_than_the_run_takes_keep_all_of_it() -> None:
    """572,205 steps, saved every 4,000: 143, and one for the part at the end."""
    assert planned(recipe("125m", "checkpoint.keep_hours=1e308")).checkpoint.kept == 144


def test_hours_without_a_pace_are_said_not_to_be_counted() -> None:
    config = recipe("125m", "checkpoint.keep_hours=12", "precision=fp32")
    plan = planned(config)
    assert plan.checkpoint.kept == 3
    assert "those of the last 12 hours not counted: no step's time is known" in page(plan)
    without = replace(config, checkpoint=replace(config.checkpoint, keep_hours=0.0))
    assert (
        "hours"
        not in page(planned(without)).partition("checkpoint\n")[2].partition("not counted")[0]
    )


def test_the_plan_says_what_each_tier_costs() -> None:
    """By hand: 12 bytes a parameter less two for fp16 weights, over 992 ranks, 8 of them a node."""
    tiers = (
        "checkpoint.memory_every_steps=10",
        "checkpoint.node_every_steps=50",
        "checkpoint.memory_keep=3",
    )
    plan = planned(recipe("175b", *tiers))
    part = -(-10 * plan.parameters // 992)
    assert plan.checkpoint.node_bytes == 8 * part
    assert plan.checkpoint.memory_bytes(plan.config) == 2 * (3 + 1) * 8 * part
    assert plan.checkpoint.disk_bytes(plan.config) == (2 + 1) * 8 * part
    told = page(plan)
    assert "112.6 GB of each node's, for 3 snapshots, the next one, and a partner's as many" in told
    assert "14.08 GB from node to node every 10 steps" in told
    assert "42.24 GB of each, for 2 snapshots and the next one, one every 50 steps" in told
    assert "up to 10 steps (3.3 minutes) where it finds a snapshot" in told


def test_replicas_and_a_lone_node_have_their_own_costs() -> None:
    plan = planned(recipe("1.3b", "checkpoint.memory_every_steps=10", "parallel.replicate=4"))
    assert plan.checkpoint.node_bytes == 8 * plan.checkpoint.bytes_per_rank
    assert plan.checkpoint.ranks * 4 == plan.config.world_size, (
        "a save is of one replica, a snapshot of all"
    )
    alone = planned(recipe("125m", "checkpoint.memory_every_steps=10"))
    assert alone.checkpoint.memory_bytes(alone.config) == 3 * alone.checkpoint.node_bytes
    assert "no node is there to copy to" in page(alone)
    off = page(planned(recipe("125m")))
    assert "none (checkpoint.memory_every_steps=0)" in off
