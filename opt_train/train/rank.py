"""One rank from `Begin` to its `ExitNotice`: build, join, restore, train, leave."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from opt_train.checkpoint import manifest as checkpoint_manifest
from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshots
from opt_train.config.run_config import RunConfig, from_json
from opt_train.data.batches import Batches, ValidationSet, open_split
from opt_train.data.manifest import HELD_OUT, DatasetManifest, check_fits
from opt_train.data.named_sets import named_sets
from opt_train.data.prepared import directory_of
from opt_train.optim.adamw import really_in_force
from opt_train.optim.in_force import differences, in_force
from opt_train.optim.loss_scale import LossScale, expected_scale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import RANK_BAD_CONFIG, BadInput
from opt_train.protocol.facts import ExitNotice, InForce, Phase, Progress
from opt_train.run.ledger import Ledger
from opt_train.train.context import RankContext
from opt_train.train.determinism import be_deterministic, explain
from opt_train.train.fact_pipe import Publish, log_line
from opt_train.train.loop import train
from opt_train.train.orders import NoOrders, OrderSource, StopSignals
from opt_train.train.rendezvous import choose_device, join
from opt_train.train.resume import (
    CannotStart,
    begin_with,
    load,
    load_loss_scale,
    read_manifest,
    read_state,
    saved_loss_scale,
    verify,
)
from opt_train.train.state import TrainState
from opt_train.train.step import values_of
from opt_train.train.training import Training, assemble

Join = Callable[[Begin, RunConfig, torch.device, Publish], dist.ProcessGroup]


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
    initial = None
    if config.train.initial_weights and manifest is None:
        initial = Path(config.train.initial_weights)
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
    report_in_force(
        config, begin.ledger, engine.optimizer, loss_scale, state, manifest, dataset, publish
    )
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


def report_in_force(
    config: RunConfig,
    ledger: Ledger,
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
    expected = in_force(config, ledger, state.step)
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
