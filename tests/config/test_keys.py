"""A training key that passes as operational would change results behind a person's back, and a
value that no law looks at fails hours later on a cluster."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest

from opt_train.config.difference import flatten, kind_of
from opt_train.config.keys import keys_of, obey_laws
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import BadInput
from opt_train.protocol.keys import (
    BELOW_ONE,
    NOT_NEGATIVE,
    OPERATIONAL,
    POSITIVE,
    TRAINING,
    Choices,
    KeyKind,
)

# What docs/configuration.md has promised for each key since there are lineages. A key may join; one
# that changes its kind changes what run directories of older versions allow.
PUBLISHED = {
    "fixed": (
        "model.layers",
        "model.heads",
        "model.d_model",
        "model.ffn",
        "model.layer_norm",
        "model.embed_dim",
        "model.vocab_size",
        "model.positions",
        "data.corpus",
        "data.max_bytes",
        "data.validation_fraction",
        "data.sequence_length",
        "tokenizer.name",
        "tokenizer.vocab_size",
        "tokenizer.vocab_file",
        "tokenizer.merges_file",
        "precision.weights",
        "train.global_batch",
        "train.initial_weights",
    ),
    "training": (
        "seed",
        "model.name",
        "model.dropout",
        "model.init_std",
        "precision.compute",
        "precision.loss_scale",
        "precision.loss_scale_initial",
        "precision.loss_scale_window_steps",
        "precision.loss_scale_floor",
        "precision.predivide",
        "optim.lr",
        "optim.beta1",
        "optim.beta2",
        "optim.eps",
        "optim.weight_decay",
        "optim.clip",
        "optim.warmup_steps",
        "optim.decay_steps",
        "optim.schedule",
        "optim.cooldown_steps",
        "optim.skip_norm_z",
        "optim.skip_norm_ratio",
        "optim.skip_loss_z",
        "optim.skip_in_row",
        "optim.final_fraction",
        "train.steps",
        "train.max_nonfinite_steps",
        "faults.garbage",
    ),
    "operational": (
        "name",
        "runs",
        "lineage",
        "ledger",
        "data.name",
        "data.directory",
        "data.validation_sets",
        "data.shard_tokens",
        "parallel.engine",
        "parallel.zero_stage",
        "parallel.replicate",
        "parallel.shard",
        "parallel.tensor",
        "parallel.activation_checkpointing",
        "parallel.accumulate",
        "parallel.compile",
        "optim.fused",
        "train.micro_batch",
        "train.validate_every",
        "train.validate_sets_every",
        "train.layer_norms_every",
        "train.attention_logit_every",
        "train.speed_probe_every",
        "train.device",
        "train.threads",
        "train.collective_timeout_seconds",
        "train.deterministic",
        "checkpoint.every_steps",
        "checkpoint.asynchronous",
        "checkpoint.keep",
        "checkpoint.keep_hours",
        "checkpoint.milestone_every_steps",
        "checkpoint.memory_every_steps",
        "checkpoint.memory_keep",
        "checkpoint.node_every_steps",
        "checkpoint.node_keep",
        "checkpoint.node_directory",
        "cluster.kind",
        "cluster.nodes",
        "cluster.min_nodes",
        "cluster.buffer_nodes",
        "cluster.slots_per_node",
        "cluster.nodes_per_domain",
        "cluster.interface",
        "cluster.slurm.holder",
        "cluster.slurm.account",
        "cluster.slurm.partition",
        "cluster.slurm.qos",
        "cluster.slurm.reservation",
        "cluster.slurm.constraint",
        "cluster.slurm.time_limit",
        "cluster.slurm.stop_before_seconds",
        "cluster.slurm.ask_for_others",
        "cluster.slurm.gpu_option",
        "cluster.slurm.options",
        "cluster.slurm.container",
        "cluster.slurm.container_image",
        "cluster.slurm.container_mounts",
        "cluster.slurm.container_python",
        "cluster.slurm.container_options",
        "cluster.slurm.supervisor_partition",
        "cluster.slurm.supervisor_time_limit",
        "cluster.slurm.supervisor_options",
        "cluster.bind_ranks",
        "cluster.code",
        "cluster.rank_module",
        "stability.mode",
        "stability.modes",
        "stability.margin_steps",
        "stability.horizon_steps",
        "stability.acts_max",
        "burn_in.before_run",
        "burn_in.on_arrival",
        "burn_in.every_seconds",
        "burn_in.return_seconds",
        "burn_in.seconds",
        "burn_in.matmul_size",
        "burn_in.matmul_seconds",
        "burn_in.gpu_memory_share",
        "burn_in.host_memory_bytes",
        "burn_in.file_bytes",
        "burn_in.pair_rounds",
        "burn_in.pair_bytes",
        "burn_in.pair_seconds",
        "burn_in.flops",
        "burn_in.disk_bytes_per_second",
        "burn_in.shared_bytes_per_second",
        "burn_in.pair_bytes_per_second",
        "burn_in.cores",
        "burn_in.clock_seconds",
        "burn_in.majority_share",
        "supervisor.mode",
        "supervisor.modes",
        "supervisor.start_seconds",
        "supervisor.step_seconds",
        "supervisor.checkpoint_seconds",
        "supervisor.evaluation_seconds",
        "supervisor.minimum_seconds",
        "supervisor.settle_seconds",
        "supervisor.orphan_seconds",
        "supervisor.join_seconds",
        "supervisor.restarts_without_progress",
        "supervisor.lemons",
        "supervisor.lemon_half_life_days",
        "supervisor.lemon_score",
        "supervisor.lemon_exclude_score",
        "supervisor.status_seconds",
        "faults.plan",
        "faults.seed",
        "sinks.wandb",
        "sinks.wandb_project",
        "sinks.wandb_mode",
        "sinks.tensorboard",
        "sinks.flush_seconds",
    ),
}


def test_every_key_keeps_the_kind_that_was_published() -> None:
    published = {key: kind for kind, keys in PUBLISHED.items() for key in keys}
    assert {key: kind_of(key) for key in flatten(RunConfig())} == published


def test_the_kinds_are_all_there_are() -> None:
    assert set(PUBLISHED) == set(KeyKind)


@pytest.mark.parametrize(
    "key",
    ["seed", "model.dropout", "optim.lr", "optim.clip", "train.steps", "precision.compute"],
)
def test_what_decides_the_numbers_is_a_training_key(key: str) -> None:
    assert kind_of(key) == "training"


@pytest.mark.parametrize(
    "key",
    [
        "model.layers",
        "train.global_batch",
        "data.sequence_length",
        "data.corpus",
        "tokenizer.vocab_size",
    ],
)
def test_what_checkpoints_and_cursor_stand_on_is_fixed(key: str) -> None:
    assert kind_of(key) == "fixed"


def test_every_number_has_its_range_checked() -> None:
    for key in keys_of(RunConfig):
        if key.type in (int, float):
            assert {POSITIVE, NOT_NEGATIVE, BELOW_ONE} & {*key.laws}, key.name


def test_the_defaults_obey_their_own_laws() -> None:
    obey_laws(RunConfig())


@dataclass(frozen=True, kw_only=True, slots=True)
class OneKind:
    key_kind: ClassVar = OPERATIONAL
    retries: Annotated[int, POSITIVE] = 3
    mode: Annotated[str, Choices("", "fast", "slow")] = ""


def test_a_room_may_declare_the_kind_of_all_its_keys_once() -> None:
    assert [(key.name, key.type, key.default, key.kind) for key in keys_of(OneKind, "room.")] == [
        ("room.retries", int, 3, "operational"),
        ("room.mode", str, "", "operational"),
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"retries": 0}, "retries=0 must be larger than 0"),
        ({"mode": "{key}"}, "mode={key} is not possible; use fast or slow"),
    ],
)
def test_a_law_speaks_of_the_key_and_the_value(values: dict[str, object], expected: str) -> None:
    with pytest.raises(BadInput) as refused:
        obey_laws(OneKind(**values))  # type: ignore[arg-type]
    assert str(refused.value) == expected


@dataclass(frozen=True, kw_only=True, slots=True)
class NoKind:
    steps: Annotated[int, POSITIVE] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoKinds:
    key_kind: ClassVar = OPERATIONAL
    steps: Annotated[int, POSITIVE, TRAINING] = 1


@pytest.mark.parametrize("room", [NoKind, TwoKinds])
def test_a_key_without_exactly_one_kind_is_refused(room: type) -> None:
    with pytest.raises(TypeError, match="steps must be declared FIXED, TRAINING or OPERATIONAL"):
        list(keys_of(room))
