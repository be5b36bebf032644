"""What ranks report as in effect is `in_force(configuration, ledger, step)`, at the start and after every restore."""

from dataclasses import replace
from pathlib import Path

from opt_train.optim.in_force import differences, in_force
from opt_train.protocol.exits import RANK_BAD_CONFIG
from opt_train.protocol.facts import InForce, Metrics
from tests.train.rig import World, tiny_config


def test_reported_values_are_those_of_the_configuration(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=6)
    with World(tmp_path, config) as world:
        world.begin()
        world.finish()
        for rank in world.ranks:
            (fact,) = rank.told(InForce)
            assert differences(in_force(config, (), 0), fact.values) == []
            assert fact.values["updates"] == 0
        # Each step's own LR too, not just the first one's.
        rates = {step: line["lr"] for step, line in world.ranks[0].metrics.items()}
        assert rates == {step: in_force(config, (), step - 1)["lr"] for step in range(1, 7)}
        checkpoint = world.commit(6)

    # OPT-175B's runs 12.35 to 12.37: new betas were configured, and the checkpoint's old ones silently used.
    changed = replace(config, optim=replace(config.optim, beta1=0.0, eps=1.0, weight_decay=0.0, lr=1e-4, clip=0.3))
    changed = replace(changed, train=replace(config.train, steps=8))
    with World(tmp_path, changed) as world:
        world.begin(attempt="2.00", generation=2, checkpoint=checkpoint)
        world.finish()
        for rank in world.ranks:
            (fact,) = rank.told(InForce)
            assert differences(in_force(changed, (), 6), fact.values) == []
            assert (fact.values["beta1"], fact.values["eps"], fact.values["weight_decay"]) == (0.0, 1.0, 0.0)
            assert (fact.values["updates"], fact.values["step"], fact.values["samples"]) == (6, 6, 48)
        assert world.ranks[0].metrics[7]["grad_norm_clipped"] <= 0.3 + 1e-6


def test_wrong_cursor_stops_the_run_and_is_named(tmp_path: Path) -> None:
    """Another batch size after a restore would move the cursor to samples that were seen, or skip some."""
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
        assert not world.ranks[0].told(Metrics)
