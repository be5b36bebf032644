"""A facts pipe that nobody reads changes neither losses nor progress; it costs metrics, and those
are counted."""

import fcntl
from dataclasses import replace
from pathlib import Path

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config.run_config import RunConfig
from opt_train.protocol.facts import ExitNotice, InForce, ShardsSaved
from tests.train.rig import World, tensors_in, tiny_config

STEPS = 150


def small(folder: Path) -> RunConfig:
    config = tiny_config(folder, steps=STEPS, global_batch=2, micro_batch=2)
    model = replace(config.model, layers=1, d_model=16, heads=2, ffn=32)
    # More facts than a pipe holds: 150 steps with several of 40 to 600 bytes.
    return replace(config, model=model, checkpoint=CheckpointConfig(every_steps=50))


def test_unread_pipe_changes_neither_losses_nor_progress(tmp_path: Path) -> None:
    config = small(tmp_path)
    heard_folder, deaf_folder = tmp_path / "heard", tmp_path / "deaf"
    heard_folder.mkdir()
    deaf_folder.mkdir()
    with World(heard_folder, config, world_size=1) as world:
        world.begin()
        world.finish()
        heard = world.ranks[0]
        reference = tensors_in(world.commit(STEPS))
        assert len(heard.metrics) == STEPS

    with World(deaf_folder, config, world_size=1) as world:
        rank = world.ranks[0]
        fcntl.fcntl(rank.facts_fd, fcntl.F_SETPIPE_SZ, 1 << 16)
        world.begin()
        final = deaf_folder / "run" / "checkpoints" / "1.00" / f"step-{STEPS:08d}" / "state.json"
        # Nobody reads the pipe, until the log says that the last step is done and saved.
        world.wait(
            lambda: final.exists() and b"leaving" in rank.log.read_bytes(),
            "the last save",
            reading=[],
        )
        world.finish()
        assert tensors_in(final.parent) == reference
        dropped = STEPS - len(rank.metrics)
        assert dropped > 0, "the pipe took everything: the test shows nothing"
        (leaving,) = rank.published(ExitNotice)
        assert (leaving.code, leaving.dropped_metrics) == (0, dropped)
        for step, line in rank.metrics.items():
            assert line["loss"] == heard.metrics[step]["loss"]
        # Facts were not dropped, and came in order.
        assert [fact.step for fact in rank.published(ShardsSaved)] == [50, 100, 150]
        assert len(rank.published(InForce)) == 1
        assert rank.log.read_text().count(" generation 1 step ") == STEPS
