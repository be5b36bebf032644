"""A model must be compared with the released one of its own shape, and only on numbers that are
published."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from opt_train.evaluate.published import PUBLISHED, SHAPES, TASKS, published, size_of
from opt_train.model.config import ModelConfig

PRESETS = {
    path.stem: ModelConfig(**yaml.safe_load(path.read_text()))
    for path in (Path(__file__).parents[2] / "configs" / "model").glob("*.yaml")
}


def test_each_size_has_a_number_for_each_task() -> None:
    assert list(PUBLISHED) == [
        f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    ]
    assert {len(row) for row in PUBLISHED.values()} == {7}
    assert TASKS == ("lambada_openai", "piqa", "arc_easy", "arc_challenge", "winogrande", "sciq")


@pytest.mark.parametrize("column", range(1, 7))
def test_larger_models_are_better_but_for_noise(column: int) -> None:
    """A slip of the pen would stand out."""
    row = [values[column] for values in PUBLISHED.values()]
    assert all(after > before - 1 for before, after in itertools.pairwise(row))
    perplexities = [values[0] for values in PUBLISHED.values()]
    assert perplexities == sorted(perplexities, reverse=True)


def test_accuracies_are_fractions_and_perplexities_are_not() -> None:
    assert published("opt-125m", "lambada_openai", "perplexity") == 26.02
    assert published("opt-125m", "lambada_openai", "acc") == 0.379
    assert published("opt-66b", "sciq", "acc") == 0.926
    assert published("opt-66b", "sciq", "acc_norm") is None
    assert published("opt-66b", "hellaswag", "acc") is None
    assert published("opt-175b", "sciq", "acc") is None
    assert published(None, "sciq", "acc") is None


def test_each_preset_is_known_as_what_it_is_called() -> None:
    assert list(SHAPES) == list(PUBLISHED)
    assert {name: size_of(model) for name, model in PRESETS.items()} == {
        name: name if name in PUBLISHED else None for name in PRESETS
    }
    assert {"opt-175b", "tiny"} < PRESETS.keys()


@pytest.mark.parametrize("size", ["opt-125m", "opt-350m"])
def test_a_size_is_known_by_its_shape_whatever_it_is_called(size: str) -> None:
    model = PRESETS[size]
    assert size_of(replace(model, name="mine", vocab_size=400, positions=64, dropout=0.0)) == size
    assert size_of(replace(model, embed_dim=model.embedding_width)) == size


def test_a_name_alone_is_no_size() -> None:
    model = PRESETS["opt-125m"]
    for changed in (
        replace(model, layers=11),
        replace(model, layer_norm="post"),
        replace(model, embed_dim=512),
    ):
        assert size_of(changed) is None
