"""A training key that passes as operational would change results behind a person's back."""

from dataclasses import replace

import pytest

from opt_train.config import OPERATIONAL, RunConfig, compose, difference, flatten, is_operational


def test_changes_are_told_apart_and_in_words() -> None:
    old = compose(["experiment=demo"])
    new = compose(["experiment=demo", "optim.lr=1e-3", "checkpoint.keep=5", "seed=4", "cluster.interface=eth0"])
    training, operational = difference(old, new)
    assert training == ["seed: 0 -> 4", "optim.lr: 0.003 -> 0.001"]
    assert operational == ["checkpoint.keep: 3 -> 5", 'cluster.interface: "" -> eth0']


def test_asking_for_a_lineage_is_no_difference() -> None:
    assert difference(RunConfig(), replace(RunConfig(), lineage="new")) == ([], [])


@pytest.mark.parametrize(
    "key",
    ["seed", "model.layers", "model.dropout", "optim.lr", "optim.clip", "train.steps", "train.global_batch",
     "data.sequence_length", "data.corpus", "data.validation_fraction", "tokenizer.vocab_size", "precision.compute"],
)  # fmt: skip
def test_what_decides_the_numbers_is_a_training_key(key: str) -> None:
    assert not is_operational(key)


def test_every_operational_entry_names_a_key_or_a_room() -> None:
    keys = flatten(RunConfig())
    for entry in OPERATIONAL:
        assert entry in keys or any(key.startswith(entry + ".") for key in keys), entry
