"""Sharded training against a plain PyTorch loop that knows nothing of it: the same data, seeds and
recipe."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opt_train.config.run_config import RunConfig
from opt_train.data.batches import Batches
from opt_train.data.order import Cursor
from opt_train.data.token_stream import open_split
from opt_train.model.decoder import OPT
from opt_train.model.init import initialise
from opt_train.optim.schedule import learning_rate
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from tests.train.rig import World, tiny_config

STEPS = 10


def without_dropout(folder: Path, **train: int) -> RunConfig:
    config = tiny_config(folder, steps=STEPS, **train)
    return replace(config, model=replace(config.model, dropout=0.0))


def plain_losses(config: RunConfig) -> list[float]:
    """The textbook: whole batch, mean cross entropy, clip, AdamW."""
    model = OPT(config.model)
    initialise(model, config.model, config.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    stream = open_split(Path(config.data.directory), "train", verify=True)
    batches = Batches(stream, config.data.sequence_length, config.train.global_batch, config.seed)
    losses = []
    for step in range(STEPS):
        cursor = Cursor(step * config.train.global_batch)
        (batch,) = batches.at(
            cursor, data_rank=0, data_world=1, micro_batch=config.train.global_batch
        )
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def real_losses(folder: Path, config: RunConfig, world_size: int) -> list[float]:
    with World(folder, config, world_size) as world:
        world.begin()
        assert {leaving.code for leaving in world.finish()} == {0}
        return [world.ranks[0].metrics[step]["loss"] for step in range(1, STEPS + 1)]


def test_two_shards_train_like_one_plain_process(tmp_path: Path) -> None:
    config = without_dropout(tmp_path)
    expected = plain_losses(config)
    assert expected[-1] < expected[0] - 0.3
    found = real_losses(tmp_path, config, 2)
    assert found == pytest.approx(expected, rel=1e-6)


def test_unequal_shares_weigh_by_tokens(tmp_path: Path) -> None:
    """7 sequences on 2 ranks, in micro-batches of 3: an average of the ranks' averages would be
    wrong."""
    config = without_dropout(tmp_path, global_batch=7, micro_batch=3)
    assert real_losses(tmp_path, config, 2) == pytest.approx(plain_losses(config), rel=1e-6)


def test_replicas_of_shards_train_the_same(tmp_path: Path) -> None:
    """Hybrid sharding counts each gradient shard once in the norm, however many replicas hold
    it."""
    config = replace(without_dropout(tmp_path), parallel=ParallelConfig(replicate=2))
    assert real_losses(tmp_path, config, 4) == pytest.approx(plain_losses(config), rel=1e-6)


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    config = replace(without_dropout(tmp_path), precision=PrecisionConfig(compute="bf16"))
    assert real_losses(tmp_path, config, 2) == pytest.approx(plain_losses(config), rel=5e-3)
