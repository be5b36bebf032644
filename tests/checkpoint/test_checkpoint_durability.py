"""A manifest vouches for bytes that are on the disk: power loss right behind its rename must not
take any of them."""

from pathlib import Path

import pytest
import torch

from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.manifest import MANIFEST
from opt_train.checkpoint.save import save
from tests.durability import recorded


def test_every_shard_and_every_name_is_durable_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "1.00" / "step-00000004"
    deeds = recorded(monkeypatch)
    files = {
        file.path: (file.bytes, file.sha256)
        for file in save({"model.a": torch.ones(9)}, {"step": 4}, folder)
    }
    commit_manifest(folder, build_manifest(folder, "1.00", 4, files))
    committed = deeds.index(("rename", MANIFEST))
    before, after = deeds[:committed], deeds[committed + 1 :]
    assert len(files) == 2
    assert {("sync", name) for name in files} <= set(before)
    assert {("sync", name) for name in ("checkpoints", "1.00", f"{MANIFEST}.partial")} <= set(
        before
    )
    last_file = max(before.index(("sync", name)) for name in files)
    assert ("sync", folder.name) in before[last_file:], "names as well as bytes"
    assert ("sync", folder.name) in after, "and the manifest's own"
