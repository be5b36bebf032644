"""One rank from `Begin` to its `ExitNotice`: build, join, restore, train, leave."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opt_train.checkpoint import manifest as checkpoint_manifest
from opt_train.checkpoint.late_files import retry_while_late
from opt_train.checkpoint.manifest import CheckpointError, own_file_name
from opt_train.checkpoint.restore import load_files, restore, verify_files
from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshots
from opt_train.checkpoint.tensors import WeightsAlone
from opt_train.config.run_config import RunConfig, from_json
from opt_train.data.batches import Batches, ValidationSet, open_split
from opt_train.data.manifest import HELD_OUT, DatasetManifest, check_fits
from opt_train.data.named_sets import named_sets
from opt_train.data.prepared import directory_of
from opt_train.optim.adamw import really_in_force
from opt_train.optim.in_force import differences, in_force
from opt_train.optim.loss_scale import LossScale, expected_scale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.engine import Engine, EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import RANK_BAD_CONFIG, BadInput
from opt_train.protocol.facts import ExitNotice, InForce, Phase, Progress
from opt_train.train.context import RankContext
from opt_train.train.determinism import be_deterministic, explain
from opt_train.train.fact_pipe import Publish, log_line
from opt_train.train.loop import train
from opt_train.train.orders import NoOrders, OrderSource, StopSignals
from opt_train.train.rendezvous import choose_device, join
from opt_train.train.state import TrainState
from opt_train.train.step import values_of
from opt_train.train.training import Training, assemble

Join = Callable[[Begin, RunConfig, torch.device, Publish], dist.ProcessGroup]


class CannotStart(Exception):
    """The rank must not train: what it was given does not fit. Becomes `ExitNotice` with code 78
    and the cause."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


def run_rank(
    begin: Begin, publish: Publish, orders: OrderSource, signals: StopSignals, joins: Join = join
) -> int:
    """Be rank `begin.rank` until training ends; returns the exit code. `ExitNotice` is the last
    fact published.

    Raises:
        Exception: anything unforeseen, without an `ExitNotice`: the agent reports the exit code and
            the log's end.
    """
    try:
        notice = train(start(begin, publish, orders, signals, joins))
    except CannotStart as error:
        notice = ExitNotice(RANK_BAD_CONFIG, -1, str(error), cause=error.cause)
    except BadInput as error:
        notice = ExitNotice(RANK_BAD_CONFIG, -1, str(error), cause="config")
    except RuntimeError as error:
        if (reason := explain(error)) is None:
            raise
        notice = ExitNotice(RANK_BAD_CONFIG, -1, reason, cause="config")
    log_line(f"leaving with code {notice.code} at step {notice.step}: {notice.reason}")
    publish(notice)
    return notice.code


def start(
    begin: Begin, publish: Publish, orders: OrderSource, signals: StopSignals, joins: Join = join
) -> Training:
    """Everything up to the first step.

    Raises:
        CannotStart, BadInput: configuration, data or checkpoint is not what it should be.
    """
    publish(Phase("start", 0))
    config = read_config(begin)
    layout = Layout.of(config.parallel, begin.world_size)
    if config.train.deterministic:
        be_deterministic()
    device = choose_device(config.train.device, begin.local_rank)
    set_threads(config, begin.world_size, device)
    # Before anybody waits for anybody: a rank that was given rubbish should leave at once.
    dataset, batches, validation_sets = open_data(config)
    manifest = read_manifest(begin, publish)
    state = read_state(manifest, dataset)
    state.ledger = begin.ledger

    group = joins(begin, config, device, publish)
    if manifest is not None:
        # Before any memory is filled: a checkpoint that is bad costs a restart its reading alone.
        verify(begin, manifest, group, publish)
    initial = (
        Path(config.train.initial_weights)
        if config.train.initial_weights and manifest is None
        else None
    )
    # A checkpoint fills every weight: drawing them first would cost a restart minutes.
    seed = config.seed if manifest is None and initial is None else None
    engine = make_engine(
        EngineSpec(
            model=config.model,
            precision=config.precision,
            parallel=config.parallel,
            layout=layout,
            device=device,
            values=in_force(config, state.ledger, state.step),
            seed=seed,
            fused=config.optim.fused,
            progress=lambda done, all_: publish(Progress(done, all_)),
        )
    )
    loss_scale = LossScale(policy_of(config.precision), device)
    if manifest is not None:
        load(engine, begin, manifest, group)
        load_loss_scale(loss_scale, manifest)
    if initial is not None:
        begin_with(engine, initial, group, publish)
    report_in_force(begin, config, engine.optimizer, loss_scale, state, manifest, dataset, publish)
    engine.model.train()
    # Whoever gives orders is an agent; without one nobody would hold a snapshot.
    takes_snapshots = config.checkpoint.memory_every_steps and not isinstance(orders, NoOrders)
    memory = None
    if takes_snapshots:
        memory = Snapshots(begin.rank, config.checkpoint.memory_keep, device)
    # A snapshot is no checkpoint: a run that began from one saves its step anew.
    is_saved = manifest is not None and manifest.state.get(PARTS) != OWN
    context = RankContext(
        begin=begin,
        config=config,
        layout=layout,
        device=device,
        engine=engine,
        loss_scale=loss_scale,
        data_fingerprint=dataset.fingerprint,
        state=state,
        publish=publish,
    )
    return assemble(
        context,
        group,
        batches=batches,
        validation_sets=validation_sets,
        memory=memory,
        saved_step=state.step if is_saved else -1,
        orders=orders,
        signals=signals,
    )


def read_config(begin: Begin) -> RunConfig:
    """The configuration that the supervisor meant, to the byte.

    Raises:
        CannotStart: the file is not there or is another one.
    """
    path = Path(begin.config_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CannotStart("config", f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != begin.config_sha256:
        raise CannotStart(
            "config", f"{path} is not the configuration this attempt was started with"
        )
    try:
        return from_json(path)
    except (ValueError, TypeError) as error:
        raise CannotStart("config", f"{path} does not read as a configuration: {error}") from None


def open_data(config: RunConfig) -> tuple[DatasetManifest, Batches, dict[str, ValidationSet]]:
    """Map the token shards, those of each validation set by its name.

    Raises:
        CannotStart: they are missing, damaged, or do not fit the model.
    """
    directory = directory_of(config.data, config.tokenizer)
    length = config.data.sequence_length
    try:
        dataset = DatasetManifest.read(directory)
        check_fits(dataset, vocab_size=config.model.vocab_size, sequence_length=length)
        batches = Batches(
            open_split(directory, "train", verify=False),
            length,
            config.train.global_batch,
            config.seed,
        )
        validation_sets = {
            name: ValidationSet(open_split(directory, name, verify=False), length, name)
            for name in (HELD_OUT, *named_sets(config.data))
        }
    except BadInput as error:
        raise CannotStart("data", str(error)) from None
    return dataset, batches, validation_sets


def read_manifest(begin: Begin, publish: Publish) -> checkpoint_manifest.Manifest | None:
    """The manifest of the checkpoint to restore; None only where none was asked for.

    Raises:
        CannotStart: it is missing, damaged or another one. Training never starts from scratch
            instead.
    """
    if begin.checkpoint is None:
        return None
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


def report_in_force(
    begin: Begin,
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale,
    state: TrainState,
    manifest: checkpoint_manifest.Manifest | None,
    dataset: DatasetManifest,
    publish: Publish,
) -> None:
    """Publish what is really in effect, read back from the optimizer and the cursor, and refuse
    what should not be.

    Raises:
        CannotStart: a value differs from `in_force(configuration, ledger, step)`, the optimizer has
            another count of updates than the checkpoint's state, or the loss scale is not the
            checkpoint's.
    """
    expected = in_force(config, begin.ledger, state.step)
    expected["loss_scale"] = expected_scale(loss_scale.policy, saved_loss_scale(manifest))
    values = {
        **really_in_force(optimizer),
        "clip": values_of(config, state)["clip"],
        "loss_scale": loss_scale.scale.item(),
        "samples": state.cursor.samples,
        "step": state.step,
        "data_fingerprint": dataset.fingerprint,
    }
    publish(InForce(values))
    wrong = differences({**expected, "updates": state.updates}, values)
    if wrong:
        raise CannotStart("config", "not in force as it should be: " + "; ".join(wrong))


def set_threads(config: RunConfig, world_size: int, device: torch.device) -> None:
    """Threads of this rank: as configured, or its share of the machine's cores."""
    if device.type == "cuda" and not config.train.threads:
        return
    cores = len(os.sched_getaffinity(0))
    neighbours = config.cluster.ranks_per_machine(world_size)
    torch.set_num_threads(config.train.threads or max(1, cores // neighbours))
