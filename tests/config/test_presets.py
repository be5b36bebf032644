"""Presets must be the published models, and everything packaged must compose."""

from dataclasses import asdict

import pytest
import torch

from opt_train.config.compose import compose, configs_directory, to_yaml
from opt_train.model.decoder import OPT
from opt_train.model.sizes import parameter_count

# arXiv 2205.01068, table 1, counted by hand for a vocabulary of 50272 and 2050 position rows, tied;
# 350m as released.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    config = compose([f"model={name}", f"optim={name}", "train.steps=100000"])
    with torch.device("meta"):
        model = OPT(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert parameter_count(config.model) == PUBLISHED[name]
    assert config.model.name == name
    assert config.model.ffn == 4 * config.model.d_model


@pytest.mark.parametrize(
    ("name", "lr", "warmup_tokens"),
    [
        ("opt-125m", 6.0e-4, 375e6),
        ("opt-350m", 3.0e-4, 375e6),
        ("opt-1.3b", 2.0e-4, 375e6),
        ("opt-2.7b", 1.6e-4, 375e6),
        ("opt-6.7b", 1.2e-4, 375e6),
        ("opt-13b", 1.0e-4, 375e6),
        ("opt-30b", 1.0e-4, 375e6),
        ("opt-66b", 0.8e-4, 375e6),
        ("opt-175b", 1.2e-4, 2000 * 992 * 2048),
    ],
)
def test_a_preset_has_the_published_schedule(name: str, lr: float, warmup_tokens: float) -> None:
    sequences = {
        "1.3b": 512,
        "2.7b": 512,
        "6.7b": 1024,
        "13b": 2048,
        "30b": 2048,
        "66b": 1024,
        "175b": 992,
    }
    batch_tokens = sequences.get(name.removeprefix("opt-"), 256) * 2048
    config = compose([f"model={name}", f"optim={name}", "train.steps=100000"])
    assert config.optim.lr == pytest.approx(lr)
    assert config.optim.warmup_steps * batch_tokens == pytest.approx(warmup_tokens, rel=0.005)


def test_the_demo_is_a_few_million_parameters_on_two_nodes_and_a_spare() -> None:
    config = compose(["experiment=demo"])
    assert 2e6 < parameter_count(config.model) < 4e6
    assert (config.cluster.nodes, config.cluster.slots_per_node, config.cluster.buffer_nodes) == (
        2,
        1,
        1,
    )
    assert config.checkpoint.every_steps * 3 < config.train.steps


CORPUS = ("data.corpus=texts",)
GPT2 = ("tokenizer.vocab_file=vocab.json", "tokenizer.merges_file=merges.txt")


def what_must_be_added(choice: str) -> tuple[str, ...]:
    """The values that only a user has; without them each of these says so (test_recipes.py,
    test_mistakes.py)."""
    if choice.startswith("experiment=opt-"):
        return CORPUS + GPT2
    return {"data=files": CORPUS, "tokenizer=gpt2": GPT2}.get(choice, ())


@pytest.mark.parametrize(
    "choice",
    sorted(f"{path.parent.name}={path.stem}" for path in configs_directory().glob("*/*.yaml")),
)
def test_every_packaged_choice_composes(choice: str) -> None:
    config = compose(
        ["train.steps=100000", "data.sequence_length=128", choice, *what_must_be_added(choice)]
    )
    group, name = choice.split("=")
    if group in ("model", "data", "tokenizer"):
        assert getattr(config, group).name == name


def test_without_overrides_the_defaults_hold_together() -> None:
    assert compose([]).model.name == "opt-125m"


def test_the_printed_configuration_reads_as_the_same_configuration() -> None:
    from omegaconf import OmegaConf

    config = compose(["experiment=demo", "optim.eps=1e-12"])
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(config))) == asdict(config)


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose(
        ["model=tiny", "experiment=demo", "data.sequence_length=64", "tokenizer.vocab_size=1000"]
    )
    assert (config.model.name, config.data.sequence_length) == ("tiny", 64)


def test_a_users_own_folder_adds_choices(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nlayers: 3\n")
    config = compose(["model=mine"], tmp_path)
    assert (config.model.name, config.model.layers, config.model.heads) == ("mine", 3, 12)
    assert compose(["model=tiny"], tmp_path).model.name == "tiny"
