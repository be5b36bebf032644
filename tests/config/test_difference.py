"""A training key that passes as operational would change results behind a person's back."""

from dataclasses import replace

from opt_train.config.compose import compose
from opt_train.config.difference import difference
from opt_train.config.run_config import RunConfig


def test_changes_are_told_apart_and_in_words() -> None:
    old = compose(["experiment=demo"])
    new = compose(
        [
            "experiment=demo",
            "optim.lr=1e-3",
            "checkpoint.keep=5",
            "seed=4",
            "cluster.interface=lo",
            "model.layers=3",
        ]
    )
    changed = difference(old, new)
    assert changed.fixed == (f"model.layers: {old.model.layers} -> 3",)
    assert changed.training == ("seed: 0 -> 4", "optim.lr: 0.003 -> 0.001")
    assert changed.operational == ("checkpoint.keep: 3 -> 5", 'cluster.interface: "" -> lo')


def test_asking_for_a_lineage_is_no_difference() -> None:
    assert difference(RunConfig(), replace(RunConfig(), lineage="new")) == ((), (), ())
