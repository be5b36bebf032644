"""What must hold on a GPU as on a CPU. Without a GPU the same tests run on the CPU once, which
keeps them in order."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opt_train.config.run_config import RunConfig
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.facts import ShardsSaved, SnapshotTaken
from opt_train.train.orders import NoOrders, StopSignals
from opt_train.train.rank import start
from opt_train.train.step import read_batch, take_step
from tests.train.rig import World, begin_alone, tensors_in, tiny_config

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
ON_GPU = pytest.param("cuda", marks=NEEDS_GPU)


def config_on(
    device: str, folder: Path, compute: str, dropout: float = 0.1, **train: object
) -> RunConfig:
    config = tiny_config(folder, device=device, **train)
    return replace(
        config,
        precision=PrecisionConfig(compute=compute),
        model=replace(config.model, dropout=dropout),
    )


def train(folder: Path, config: RunConfig) -> tuple[dict[int, float], dict[tuple[str, str], str]]:
    """The losses by step, and the final checkpoint's hashes."""
    folder.mkdir()
    with World(folder, config, world_size=1) as world:
        world.begin()
        assert [leaving.code for leaving in world.finish()] == [0]
        losses = {step: line["loss"] for step, line in world.ranks[0].metrics.items()}
        return losses, tensors_in(Path(world.ranks[0].published(ShardsSaved)[-1].folder))


@pytest.mark.parametrize(
    ("device", "compute"),
    [
        ("cpu", "fp16"),
        *(pytest.param("cuda", compute, marks=NEEDS_GPU) for compute in ("fp32", "bf16", "fp16")),
    ],
)
def test_deterministic_training_gives_the_same_bits_twice(
    device: str, compute: str, tmp_path: Path
) -> None:
    config = config_on(device, tmp_path, compute, steps=8, deterministic=True)
    assert train(tmp_path / "once", config) == train(tmp_path / "again", config)


@NEEDS_GPU
def test_a_gpu_follows_the_cpu(tmp_path: Path) -> None:
    """Without dropout, whose random numbers differ by device; in fp32, in which torch by default
    uses no TF32."""
    on_cpu, _ = train(tmp_path / "cpu", config_on("cpu", tmp_path, "fp32", dropout=0.0))
    on_gpu, _ = train(tmp_path / "gpu", config_on("cuda", tmp_path, "fp32", dropout=0.0))
    assert on_gpu.keys() == on_cpu.keys()
    assert all(abs(on_gpu[step] - loss) < 1e-4 for step, loss in on_cpu.items())


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_step_calls_nothing_that_synchronises(device: str, compute: str, tmp_path: Path) -> None:
    """CUDA's own word for it; the readback waits for an event, which is not one of these calls."""
    probed = {"layer_norms_every": 3, "attention_logit_every": 3, "speed_probe_every": 3}
    config = config_on(device, tmp_path, compute, global_batch=4, micro_batch=2, **probed)
    try:
        run = start(begin_alone(tmp_path, config), lambda fact: None, NoOrders(), StopSignals())
        take_step(run, *read_batch(run))  # what is done once, such as FSDP's set-up, is done
        for _ in range(2):  # the second of these steps, the third of all, has every probe
            micro_batches, seconds = read_batch(run)
            assert len(micro_batches) == 2
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                take_step(run, micro_batches, seconds)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_saves_and_snapshots_beside_training_are_exact(device: str, tmp_path: Path) -> None:
    """A save and a snapshot of one step, both copied while the next computes, hold the same; both
    are gone on from."""
    config = config_on(device, tmp_path, "bf16", steps=12, deterministic=True)
    config = replace(
        config, checkpoint=replace(config.checkpoint, every_steps=4, memory_every_steps=4)
    )
    whole, end = train(tmp_path / "whole", config)
    folder = tmp_path / "broken"
    folder.mkdir()
    with World(folder, config, world_size=1) as world:
        world.begin()
        world.wait(lambda: bool(world.ranks[0].published(ShardsSaved)), "the save of step 4")
        # The first snapshot is of the beginning.
        world.wait(
            lambda: len(world.ranks[0].published(SnapshotTaken)) > 1, "the snapshot of step 4"
        )
        saved, held = (
            world.ranks[0].published(ShardsSaved)[0],
            world.ranks[0].published(SnapshotTaken)[1],
        )
        assert saved.step == held.step == 4
        world.finish()
        checkpoint = world.commit(4)
    (of_save,) = (file.sha256 for file in saved.files if file.path.endswith(".safetensors"))
    assert of_save == next(
        file.sha256 for file in held.files if file.path == "shard-00000.safetensors"
    )
    with World(folder, config, world_size=1) as world:
        world.begin(attempt="1.01", generation=2, checkpoint=checkpoint)
        assert [leaving.code for leaving in world.finish()] == [0]
        again = {step: line["loss"] for step, line in world.ranks[0].metrics.items()}
        assert again == {step: whole[step] for step in range(5, 13)}
        assert tensors_in(Path(world.ranks[0].published(ShardsSaved)[-1].folder)) == end
