"""What a rank goes on from: reads, verifies and loads the checkpoint that `Begin` names, and says
what is in force then.

Whatever is wrong with it ends the rank with a cause. It never trains from scratch instead: that is
for whoever chose the checkpoint to decide.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opt_train.checkpoint import manifest as checkpoint_manifest
from opt_train.checkpoint.late_files import retry_while_late
from opt_train.checkpoint.manifest import CheckpointError, own_file_name
from opt_train.checkpoint.restore import load_files, restore, verify_files
from opt_train.checkpoint.snapshot import OWN, PARTS
from opt_train.checkpoint.tensors import WeightsAlone
from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DatasetManifest
from opt_train.optim.adamw import really_in_force
from opt_train.optim.in_force import differences, in_force
from opt_train.optim.loss_scale import LossScale, expected_scale
from opt_train.parallel.engine import Engine
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import InForce, Progress
from opt_train.run.fabric_settings import fabric_settings
from opt_train.run.ledger import Ledger
from opt_train.train.fact_pipe import Publish
from opt_train.train.state import TrainState, cursor_of, values_of


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


def put_ledger_in_force(config: RunConfig, state: TrainState, ledger: Ledger) -> None:
    """Give the state the run's ledger, which may know more than that of the time: an order that was
    obeyed at this very step moves the cursor now.

    Raises:
        CannotStart: the state's cursor is not where its own ledger puts it.
    """
    expected = {"samples": in_force(config, state.ledger, state.step)["samples"]}
    if wrong := differences(expected, {"samples": state.samples}):
        raise CannotStart("config", "not in force as it should be: " + "; ".join(wrong))
    state.ledger = ledger
    state.cursor = cursor_of(config, state)


def report_in_force(
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale,
    state: TrainState,
    saved_scale: Mapping[str, Any] | None,
    data_fingerprint: str,
    seconds: Mapping[str, float],
    publish: Publish,
) -> None:
    """Publish what is really in effect, read back from the optimizer and the cursor, and refuse
    what should not be.

    Args:
        saved_scale: the loss scale that was saved with the state; None: there was none.
        seconds: how long each part of getting here took.

    Raises:
        CannotStart: a value differs from `in_force(configuration, ledger, step)`, the optimizer has
            another count of updates than the state, or the loss scale is not the saved one.
    """
    expected = in_force(config, state.ledger, state.step)
    # Where an order sets it here, what was saved is another.
    expected.setdefault("loss_scale", expected_scale(loss_scale.policy, saved_scale))
    given = values_of(config, state)
    values = {
        **really_in_force(optimizer),
        "clip": given["clip"],
        "embedding_gradient": given["embedding_gradient"],
        "loss_scale": loss_scale.scale.item(),
        "samples": state.cursor.samples,
        "step": state.step,
        "data_fingerprint": data_fingerprint,
    }
    if "loss_scale_floor" in expected:
        values["loss_scale_floor"] = loss_scale.floor
        values["loss_scale_window_steps"] = loss_scale.window_steps
    publish(InForce(values, fabric_settings(os.environ), seconds))
    wrong = differences({**expected, "updates": state.updates}, values)
    if wrong:
        raise CannotStart("config", "not in force as it should be: " + "; ".join(wrong))
