"""What a rank goes on from: reads, verifies and loads the checkpoint that `Begin` names.

Whatever is wrong with it ends the rank with a cause. It never trains from scratch instead: that is
for whoever chose the checkpoint to decide.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opt_train.checkpoint import manifest as checkpoint_manifest
from opt_train.checkpoint.late_files import retry_while_late
from opt_train.checkpoint.manifest import CheckpointError, own_file_name
from opt_train.checkpoint.restore import load_files, restore, verify_files
from opt_train.checkpoint.snapshot import OWN, PARTS
from opt_train.checkpoint.tensors import WeightsAlone
from opt_train.data.manifest import DatasetManifest
from opt_train.optim.loss_scale import LossScale
from opt_train.parallel.engine import Engine
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Progress
from opt_train.train.fact_pipe import Publish
from opt_train.train.state import TrainState


class CannotStart(Exception):
    """The rank must not train: what it was given does not fit. Becomes `ExitNotice` with code 78
    and the cause."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


def read_manifest(begin: Begin, publish: Publish) -> checkpoint_manifest.Manifest | None:
    """The manifest of the checkpoint to restore; None only where none was asked for.

    Raises:
        CannotStart: it is missing, damaged or another one. Training never starts from scratch
            instead.
    """
    if begin.checkpoint is None:
        return None
    # By path and hash, never "the newest folder", which may be one that a save has not finished.
    if not begin.manifest_sha256:
        raise CannotStart(
            "corrupt_checkpoint", f"no hash came with the checkpoint {begin.checkpoint}"
        )
    folder, sha256 = Path(begin.checkpoint), begin.manifest_sha256
    try:
        # Another node committed it, perhaps a moment ago. To wait for it, which has an end, is not
        # to hang.
        return retry_while_late(
            folder,
            lambda: checkpoint_manifest.read(folder, sha256),
            waiting=lambda: publish(Progress(0, 0)),
        )
    except CheckpointError as error:
        raise CannotStart("corrupt_checkpoint", str(error)) from None


def read_state(
    manifest: checkpoint_manifest.Manifest | None, dataset: DatasetManifest
) -> TrainState:
    """Where training stands: at the manifest's step, or at the beginning.

    Raises:
        CannotStart: the state does not read, or was trained on other data.
    """
    if manifest is None:
        # Only where no checkpoint was asked for (invariant 2); metaseq trained from scratch where
        # the file to restore was missing.
        return TrainState()
    try:
        state = TrainState.from_json(manifest.state)
        fingerprint = manifest.state["data_fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise CannotStart(
            "corrupt_checkpoint", f"the checkpoint's state does not read: {error!r}"
        ) from None
    if state.step != manifest.step:
        raise CannotStart(
            "corrupt_checkpoint",
            f"the manifest is of step {manifest.step}, its state of {state.step}",
        )
    if fingerprint != dataset.fingerprint:
        raise CannotStart(
            "data",
            "the checkpoint was trained on other data: the dataset's fingerprint has changed",
        )
    return state


def verify(
    begin: Begin,
    manifest: checkpoint_manifest.Manifest,
    group: dist.ProcessGroup,
    publish: Publish,
) -> None:
    """Read the checkpoint's files, each on one of the ranks, and compare them with the manifest.

    Raises:
        CannotStart: they are not what was committed. On every rank.
    """
    assert begin.checkpoint is not None
    try:
        verify_files(
            Path(begin.checkpoint),
            manifest,
            process_group=group,
            progress=lambda done, all_: publish(Progress(done, all_)),
            rank_file=own_file(begin, manifest),
            patient=True,
        )
    except CheckpointError as error:
        raise CannotStart("corrupt_checkpoint", str(error)) from None


def load(
    engine: Engine,
    begin: Begin,
    manifest: checkpoint_manifest.Manifest,
    group: dist.ProcessGroup,
) -> None:
    """Fill the engine from the checkpoint, which was verified.

    Raises:
        CannotStart: it is not this model's. On every rank.
    """
    assert begin.checkpoint is not None
    try:
        load_files(
            engine,
            Path(begin.checkpoint),
            manifest,
            process_group=group,
            rank_file=own_file(begin, manifest),
        )
    except CheckpointError as error:
        raise CannotStart("corrupt_checkpoint", str(error)) from None


def own_file(begin: Begin, manifest: checkpoint_manifest.Manifest) -> Path | None:
    """This rank's own file of a snapshot; None: it is none, or the ranks that took it were spread
    otherwise."""
    state = manifest.state
    is_same = (
        manifest.config_sha256 == begin.config_sha256
        and state.get("world_size") == begin.world_size
    )
    if begin.checkpoint is None or state.get(PARTS) != OWN or not is_same:
        return None
    return Path(begin.checkpoint) / own_file_name(begin.rank)


def begin_with(engine: Engine, folder: Path, group: dist.ProcessGroup, publish: Publish) -> None:
    """Give the engine another checkpoint's weights, in its own type; the optimizer stays at its
    beginning.

    Raises:
        CannotStart: the checkpoint does not verify, or is of another model.
    """
    try:
        restore(
            WeightsAlone(engine),
            folder,
            checkpoint_manifest.read(folder),
            process_group=group,
            progress=lambda done, all_: publish(Progress(done, all_)),
            convert=True,
        )
    except CheckpointError as error:
        raise CannotStart(
            "config", f"train.initial_weights={folder} does not fit: {error}"
        ) from None


def load_loss_scale(loss_scale: LossScale, manifest: checkpoint_manifest.Manifest) -> None:
    """Go on with the checkpoint's loss scale.

    Raises:
        CannotStart: it does not read.
    """
    if (saved := saved_loss_scale(manifest)) is not None:
        try:
            loss_scale.restore(saved)
        except (KeyError, TypeError, ValueError) as error:
            raise CannotStart(
                "corrupt_checkpoint", f"the checkpoint's loss scale does not read: {error!r}"
            ) from None


def saved_loss_scale(manifest: checkpoint_manifest.Manifest | None) -> Mapping[str, Any] | None:
    """The loss scale that a checkpoint carries; None where there is none. Before fp16 was trained,
    checkpoints carried a plain 1.0."""
    saved = None if manifest is None else manifest.state.get("loss_scale")
    return saved if isinstance(saved, Mapping) else None
