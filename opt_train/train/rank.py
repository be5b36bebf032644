"""One rank from `Begin` to its `ExitNotice`: build, join, restore, train, leave."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from opt_train.checkpoint.snapshot import OWN, PARTS, Snapshots
from opt_train.config.run_config import RunConfig, from_json
from opt_train.data.batches import Batches, ValidationSet
from opt_train.data.garbage import GarbageBatches
from opt_train.data.manifest import HELD_OUT, DatasetManifest, check_fits
from opt_train.data.named_sets import named_sets
from opt_train.data.prepared import directory_of
from opt_train.data.token_stream import open_split
from opt_train.optim.in_force import in_force
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.optim.outlier_guard import OutlierGuard
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import RANK_BAD_CONFIG, BadInput
from opt_train.protocol.facts import ExitNotice, Phase, Progress
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
    put_ledger_in_force,
    read_manifest,
    read_state,
    report_in_force,
    saved_loss_scale,
    verify,
)
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
    # A restart of 16,000 ranks that takes minutes must say where they went.
    watch = Stopwatch()
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
    put_ledger_in_force(config, state, begin.ledger)
    watch.lap("read")

    group = joins(begin, config, device, publish)
    watch.lap("rendezvous")
    if manifest is not None:
        # Before any memory is filled: a checkpoint that is bad costs a restart its reading alone.
        verify(begin, manifest, group, publish)
        watch.lap("verify")
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
    watch.lap("build")
    if manifest is not None:
        load(engine, begin, manifest, group)
        load_loss_scale(loss_scale, manifest)
    if initial is not None:
        begin_with(engine, initial, group, publish)
    # An order of this very step may set it anew.
    loss_scale.put_in_force(in_force(config, state.ledger, state.step))
    watch.lap("load")
    report_in_force(
        config,
        engine.optimizer,
        loss_scale,
        state,
        saved_loss_scale(manifest),
        dataset.fingerprint,
        watch.seconds,
        publish,
    )
    engine.model.train()
    # Whoever gives orders is an agent; without one nobody would hold a snapshot.
    takes_snapshots = config.checkpoint.memory_every_steps and not isinstance(orders, NoOrders)
    memory = None
    if takes_snapshots:
        memory = Snapshots(begin.rank, config.checkpoint.memory_keep, device)
    # A snapshot is no checkpoint: a run that began from one saves its step anew.
    is_saved = manifest is not None and manifest.state.get(PARTS) != OWN
    guard = OutlierGuard(config.optim, device)
    guard.restore(state.accepted_norms, state.accepted_losses, state.refused_in_row)
    context = RankContext(
        begin=begin,
        config=config,
        layout=layout,
        device=device,
        engine=engine,
        loss_scale=loss_scale,
        guard=guard,
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


class Stopwatch:
    """`seconds`: how long each part of a start took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """The part that ends now is `name`."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._since, 3)
        self._since = now


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
        tokens = open_split(directory, "train", verify=False)
        batches = Batches(tokens, length, config.train.global_batch, config.seed)
        if garbage := config.faults.garbage_batches:
            batches = GarbageBatches(
                *(tokens, length, config.train.global_batch, config.seed),
                garbage=garbage,
                vocab_size=config.model.vocab_size,
            )
        validation_sets = {
            name: ValidationSet(open_split(directory, name, verify=False), length, name)
            for name in (HELD_OUT, *named_sets(config.data))
        }
    except BadInput as error:
        raise CannotStart("data", str(error)) from None
    return dataset, batches, validation_sets


def set_threads(config: RunConfig, world_size: int, device: torch.device) -> None:
    """Threads of this rank: as configured, or its share of the machine's cores."""
    if device.type == "cuda" and not config.train.threads:
        return
    cores = len(os.sched_getaffinity(0))
    neighbours = config.cluster.ranks_per_machine(world_size)
    torch.set_num_threads(config.train.threads or max(1, cores // neighbours))
