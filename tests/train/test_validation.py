"""Named validation sets in real ranks: each measured whole, on its own schedule, and published
under its own name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DatasetManifest
from opt_train.data.prepare import prepare
from opt_train.evaluate.load import load_model
from opt_train.parallel.config import ParallelConfig
from opt_train.protocol.exits import DONE, RANK_BAD_CONFIG
from opt_train.protocol.facts import Validation
from tests.model.twins import hugging_face
from tests.train.rig import World, sha256_of, tiny_config


@pytest.fixture
def sets(tmp_path: Path) -> str:
    """Two further texts, the second of a single sequence."""
    (tmp_path / "web.txt").write_text(
        " ".join(f"w{number % 89} y{number % 11}" for number in range(1500))
    )
    (tmp_path / "few.txt").write_text(
        " ".join(f"x{number % 13} z{number % 7}" for number in range(22))
    )
    return f"web={tmp_path / 'web.txt'},few={tmp_path / 'few.txt'}"


def with_sets(config: RunConfig, sets: str) -> RunConfig:
    return replace(config, data=replace(config.data, validation_sets=sets))


def prepared(folder: Path, sets: str, **train: int) -> RunConfig:
    config = with_sets(tiny_config(folder, **train), sets)
    prepare(config.data, config.tokenizer, lambda line: None)
    return config


def validations_of(world: World) -> dict[tuple[int, str], Validation]:
    facts = world.ranks[0].published(Validation)
    by_step = {(fact.step, fact.name): fact for fact in facts}
    assert len(by_step) == len(facts), "none is published twice"
    return by_step


def measured_by_hand(config: RunConfig, folder: Path, split: str) -> tuple[float, int]:
    """Mean loss and tokens of a split by Hugging Face's OPT, one sequence at a time, straight from
    the shards."""
    manifest_sha256 = sha256_of(folder / "manifest.json")
    ours = load_model(config, folder, manifest_sha256, torch.device("cpu"))
    theirs = hugging_face(config.model).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    directory, length = Path(config.data.directory), config.data.sequence_length
    shards = DatasetManifest.read(directory).shards_of(split)
    tokens = np.concatenate(
        [np.fromfile(directory / shard.path, dtype="<u2") for shard in shards]
    ).astype(np.int64)
    losses = []
    for first in range(0, len(tokens) - length, length):
        text = torch.from_numpy(tokens[first : first + length + 1])
        with torch.no_grad():
            logits = theirs(text[None, :-1]).logits[0].double()
        losses.append(cross_entropy(logits, text[1:], reduction="sum").item())
    return sum(losses) / (len(losses) * length), len(losses) * length


@pytest.mark.parametrize("tensor", [1, 2])
def test_each_set_s_loss_is_the_one_of_its_own_text(tmp_path: Path, sets: str, tensor: int) -> None:
    """Whether the two ranks share the sequences or compute each of them together."""
    config = replace(
        prepared(tmp_path, sets, steps=6, validate_every=6), parallel=ParallelConfig(tensor=tensor)
    )
    with World(tmp_path, config) as world:
        world.begin()
        assert {leaving.code for leaving in world.finish()} == {DONE}
        assert not world.ranks[1].published(Validation), "rank 0 tells for all"
        folder = world.commit(6)
        found = validations_of(world)
    assert found.keys() == {(6, "validation"), (6, "web"), (6, "few")}
    for (_, name), fact in found.items():
        loss, tokens = measured_by_hand(config, folder, name)
        assert fact.tokens == tokens
        assert fact.loss == pytest.approx(loss, rel=1e-5)
    assert len({round(fact.loss, 3) for fact in found.values()}) == 3
    assert found[6, "few"].tokens == 64, "of which a second data-parallel rank reads padding alone"


@pytest.mark.parametrize(
    ("every", "sets_every", "expected"),
    [
        (2, 0, {"validation": [2, 4, 5], "web": [2, 4, 5]}),
        (0, 2, {"validation": [5], "web": [2, 4, 5]}),
        (2, 3, {"validation": [2, 4, 5], "web": [3, 5]}),
        (0, 0, {"validation": [5], "web": [5]}),
    ],
)
def test_sets_keep_to_their_own_schedule(
    tmp_path: Path, sets: str, every: int, sets_every: int, expected: dict[str, list[int]]
) -> None:
    only_web = sets.partition(",")[0]
    config = prepared(
        tmp_path, only_web, steps=5, validate_every=every, validate_sets_every=sets_every
    )
    with World(tmp_path, config, world_size=1) as world:
        world.begin()
        world.finish()
        steps: dict[str, list[int]] = {}
        for step, name in validations_of(world):
            steps.setdefault(name, []).append(step)
        assert steps == expected


def test_a_run_that_goes_on_at_its_last_step_measures_all_sets(tmp_path: Path, sets: str) -> None:
    """One that is due after that step, but was added to the run after it had been taken, was never
    measured."""
    config = tiny_config(tmp_path, steps=4, validate_every=4)
    with World(tmp_path, config, world_size=1) as world:
        world.begin()
        world.finish()
        checkpoint = world.commit(4)
    with World(
        tmp_path, prepared(tmp_path, sets, steps=4, validate_every=4), world_size=1
    ) as world:
        world.begin(attempt="1.01", generation=2, checkpoint=checkpoint)
        assert [leaving.code for leaving in world.finish()] == [DONE]
        assert validations_of(world).keys() == {(4, "validation"), (4, "web"), (4, "few")}


def test_a_set_changes_no_step(tmp_path: Path, sets: str) -> None:
    """Measuring must leave no trace: dropout's numbers, the weights and the optimizer go on as if
    it had not been."""
    plain = tiny_config(tmp_path, steps=6)
    with World(tmp_path, plain) as world:
        world.begin()
        world.finish()
        expected = {
            step: (line["loss"], line["grad_norm"]) for step, line in world.ranks[0].metrics.items()
        }
    config = prepared(tmp_path, sets, steps=6, validate_sets_every=1)
    with World(tmp_path, config) as world:
        world.begin()
        world.finish()
        assert {
            s: (line["loss"], line["grad_norm"]) for s, line in world.ranks[0].metrics.items()
        } == expected
        assert len(validations_of(world)) == 13


def test_a_rank_whose_data_lacks_a_set_says_so_and_trains_nothing(
    tmp_path: Path, sets: str
) -> None:
    config = with_sets(tiny_config(tmp_path), sets)
    with World(tmp_path, config, world_size=1) as world:
        world.begin()
        [leaving] = world.finish()
    assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "data")
    assert (
        "holds no validation set 'web'; name it in data.validation_sets and run" in leaving.reason
    )
