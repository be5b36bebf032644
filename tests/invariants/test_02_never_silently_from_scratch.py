"""A checkpoint that was asked for and cannot be had is an error, before anything trains."""

import shutil
from pathlib import Path

import pytest

from opt_train.checkpoint.manifest import MANIFEST
from opt_train.protocol.exits import RANK_BAD_CONFIG
from opt_train.protocol.facts import ExitNotice, InForce, Metrics
from tests.train.rig import World, sha256_of, tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two steps and its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    with World(folder, tiny_config(folder, steps=2), world_size=1) as world:
        world.begin()
        world.finish()
        return folder, world.commit(2)


def resume(folder: Path, checkpoint: Path, manifest_sha256: str | None) -> ExitNotice:
    """The last words of a rank that is told to resume from `checkpoint`; it must not have
    trained."""
    with World(folder, tiny_config(folder, steps=4), world_size=1) as world:
        world.begin(
            attempt="1.01", generation=2, restore=str(checkpoint), manifest_sha256=manifest_sha256
        )
        (leaving,) = world.finish()
        assert not world.ranks[0].published(Metrics)
        assert not world.ranks[0].published(InForce)
        return leaving


def test_missing_checkpoint_is_an_error(saved: tuple[Path, Path]) -> None:
    folder, checkpoint = saved
    leaving = resume(folder, checkpoint.with_name("step-00000099"), "0" * 64)
    assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "corrupt_checkpoint")
    assert "step-00000099" in leaving.reason


def test_another_manifest_than_the_one_named_is_an_error(saved: tuple[Path, Path]) -> None:
    folder, checkpoint = saved
    leaving = resume(folder, checkpoint, "0" * 64)
    assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "corrupt_checkpoint")
    assert MANIFEST in leaving.reason


def test_checkpoint_without_its_hash_is_an_error(saved: tuple[Path, Path]) -> None:
    folder, checkpoint = saved
    leaving = resume(folder, checkpoint, None)
    assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "corrupt_checkpoint")


def test_flipped_byte_in_a_shard_is_an_error(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = saved
    damaged = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, damaged)
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    leaving = resume(folder, damaged, sha256_of(damaged / MANIFEST))
    assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "corrupt_checkpoint")
    assert shard.name in leaving.reason


def test_another_configuration_than_the_one_named_is_an_error(saved: tuple[Path, Path]) -> None:
    folder, _ = saved
    with World(folder, tiny_config(folder, steps=4), world_size=1) as world:
        world.begin(attempt="1.01", generation=2, config_sha256="0" * 64)
        (leaving,) = world.finish()
        assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "config")


def test_other_data_under_the_same_name_is_an_error(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    """A cursor into one sample order means nothing in another."""
    _, checkpoint = saved
    tiny_config(tmp_path)
    (tmp_path / "corpus" / "00.txt").write_text("something else " * 300)
    shutil.rmtree(tmp_path / "prepared")
    with World(tmp_path, tiny_config(tmp_path, steps=4), world_size=1) as world:
        world.begin(attempt="1.01", generation=2, checkpoint=checkpoint)
        (leaving,) = world.finish()
        assert (leaving.code, leaving.cause) == (RANK_BAD_CONFIG, "data")
