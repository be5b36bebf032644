"""A training key that passes as operational would change results behind a person's back."""

from dataclasses import replace

import pytest

from opt_train.config.compose import compose
from opt_train.config.difference import FIXED, OPERATIONAL, difference, flatten, kind_of
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


@pytest.mark.parametrize(
    "key",
    ["seed", "model.dropout", "optim.lr", "optim.clip", "train.steps", "precision.compute"],
)
def test_what_decides_the_numbers_is_a_training_key(key: str) -> None:
    assert kind_of(key) == "training"


@pytest.mark.parametrize(
    "key",
    [
        "model.layers",
        "train.global_batch",
        "data.sequence_length",
        "data.corpus",
        "tokenizer.vocab_size",
    ],
)
def test_what_checkpoints_and_cursor_stand_on_is_fixed(key: str) -> None:
    assert kind_of(key) == "fixed"


def test_every_entry_names_a_key_or_a_room() -> None:
    keys = flatten(RunConfig())
    for entry in (*FIXED, *OPERATIONAL):
        assert entry in keys or any(key.startswith(entry + ".") for key in keys), entry
