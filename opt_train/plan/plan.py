"""All that is known of a run that has not started. Standard library only."""

from dataclasses import dataclass, replace

from opt_train.config.run_config import RunConfig
from opt_train.model.sizes import parameter_count
from opt_train.parallel.layout import Layout
from opt_train.plan.batch import Batch
from opt_train.plan.collectives import Collective, collectives_of
from opt_train.plan.memory import MODES, Memory, memory_of
from opt_train.plan.step_memory import MOMENT_BYTES, WIDTHS
from opt_train.plan.throughput import Gpu, Throughput, throughput_of
from opt_train.protocol.exits import BadInput

GB = 10**9


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """What one save writes; bytes."""

    bytes: int
    """Weights and Adam's moments, each once."""
    bytes_per_rank: int
    """Of a rank that writes its share."""
    ranks: int
    """That write: one of the replicas."""
    kept: int
    """At the run's end: the newest, those young enough at the planned pace, and the milestones
    before them."""
    kept_bytes: int
    """Of the checkpoints that are kept, and of the next one before the oldest goes."""
    node_bytes: int
    """What the ranks of one node have of a snapshot: each its own part, the replicas too."""

    def memory_bytes(self, config: RunConfig) -> int:
        """Of a node's memory for snapshots: those it keeps and the next one, and as many of its
        partner's."""
        holders = 2 if config.cluster.nodes > 1 else 1
        return holders * (config.checkpoint.memory_keep + 1) * self.node_bytes

    def disk_bytes(self, config: RunConfig) -> int:
        """Of a node's own disk: the snapshots it keeps there, and the next one."""
        return (config.checkpoint.node_keep + 1) * self.node_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known of a run that has not started."""

    config: RunConfig
    layout: Layout
    gpu: Gpu
    parameters: int
    batch: Batch
    without_a_node: Batch | None
    """The same batch with one node fewer; None: the layout does not go on one node fewer."""
    memory: tuple[Memory, ...]
    """Under each mode of activation checkpointing (`MODES`)."""
    collectives: tuple[Collective, ...]
    throughput: Throughput
    checkpoint: CheckpointCost

    @property
    def configured(self) -> Memory:
        """Under the mode that the configuration asks for."""
        return next(
            one for one in self.memory if one.mode == self.config.parallel.activation_checkpointing
        )

    @property
    def fits(self) -> bool:
        return self.configured.peak.total <= self.gpu.memory_gb * GB


def plan_of(config: RunConfig, gpu: Gpu, mfu: float, tokens: int | None = None) -> Plan:
    """The plan of `config` on `gpu`.

    Args:
        mfu: model FLOPs utilisation to assume.
        tokens: to train on; None: what `train.steps` makes.
    """
    layout = Layout.of(config.parallel, config.world_size)
    batch = Batch.of(config, layout)
    throughput = throughput_of(config, batch, gpu, mfu, tokens)
    return Plan(
        config=config,
        layout=layout,
        gpu=gpu,
        parameters=parameter_count(config.model),
        batch=batch,
        without_a_node=_without_a_node(config),
        memory=tuple(memory_of(config, layout, mode) for mode in MODES),
        collectives=tuple(collectives_of(config, layout)),
        throughput=throughput,
        checkpoint=_checkpoint(config, layout, throughput),
    )


def _without_a_node(config: RunConfig) -> Batch | None:
    fewer = replace(config, cluster=replace(config.cluster, nodes=config.cluster.nodes - 1))
    try:
        return Batch.of(fewer, Layout.of(fewer.parallel, fewer.world_size))
    except BadInput:
        return None


def _checkpoint(config: RunConfig, layout: Layout, time: Throughput) -> CheckpointCost:
    size = (WIDTHS[config.precision.weights] + MOMENT_BYTES) * parameter_count(config.model)
    ranks = layout.shard * layout.tensor
    kept = config.checkpoint.most_kept(time.steps, time.step_seconds)
    part = -(-size // ranks)
    return CheckpointCost(
        size, part, ranks, kept, (kept + 1) * size, part * config.cluster.slots_per_node
    )
