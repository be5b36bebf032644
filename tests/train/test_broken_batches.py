"""A damaged shard ends the rank in one sentence, before a device fails over it; what is only odd is
in the metrics."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import RANK_BAD_CONFIG
from tests.train.rig import World, tiny_config


def with_tokens(config: RunConfig, token: int, every: int) -> None:
    """Overwrite each `every`-th training token, as a disk that lies would."""
    for path in Path(config.data.directory).glob("train-*.bin"):
        tokens = np.fromfile(path, dtype="<u2")
        tokens[::every] = token
        tokens.tofile(path)


def test_tokens_outside_of_the_vocabulary_are_the_datas_fault(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with_tokens(config, 60_000, every=64)
    with World(tmp_path, config) as world:
        world.begin()
        # Whoever is left alone in a collective has no last word: one rank's is enough.
        world.wait(lambda: any(rank.leaving for rank in world.ranks), "a rank's last word")
        [leaving, *_] = [rank.leaving for rank in world.ranks if rank.leaving is not None]
    assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "data")
    assert "tokens outside of model.vocab_size=512: its shards are damaged" in leaving.reason


def test_a_stream_of_one_token_shows_in_the_metrics(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=3)
    config = replace(config, model=replace(config.model, dropout=0.0))
    with_tokens(config, 77, every=1)
    with World(tmp_path, config) as world:
        world.begin()
        assert [leaving.code for leaving in world.finish()] == [0, 0], world.logs()
        lines = world.ranks[0].metrics
    for line in lines.values():
        assert line["batch_token_entropy"] == 0.0
        assert line["batch_equal_labels"] == 1.0
        # Of the four sequences of each of two ranks three are the same as the first.
        assert line["batch_duplicates"] == 6 / 8
