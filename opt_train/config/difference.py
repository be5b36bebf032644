"""What changed between two configurations, and what each change means for a run: fixed, training or
operational."""

from dataclasses import asdict
from typing import Any, NamedTuple

from opt_train.config.builder import shown
from opt_train.config.run_config import RunConfig

FIXED = (
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
    "tokenizer",
    "precision.weights",
    "train.global_batch",
    "train.initial_weights",
)
"""Keys, and rooms, that no lineage changes: the run's checkpoints would not fit the model, nor its
cursor the data."""

OPERATIONAL = (
    "name",
    "runs",
    "lineage",
    "data.name",
    "data.directory",
    "data.validation_sets",
    "data.shard_tokens",
    "parallel",
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
    "checkpoint",
    "cluster",
    "supervisor",
    "faults",
    "sinks",
)
"""Keys, and rooms, that may change between attempts: where and how the work is done. Every key that
is neither fixed nor operational is a *training* key: it decides what is computed, and changing it
opens a lineage."""


def kind_of(key: str) -> str:
    """``fixed`` for the life of a run, ``training`` or ``operational``: what a change of the dotted
    `key` does."""
    for kind, entries in (("fixed", FIXED), ("operational", OPERATIONAL)):
        if any(key == entry or key.startswith(entry + ".") for entry in entries):
            return kind
    return "training"


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every key of the configuration, dotted, with its value, in the order of the dataclasses."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat.update(
            {f"{name}.{inner}": v for inner, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


class Difference(NamedTuple):
    """What changed between two configurations, by the kind of key, each as `key: old -> new`."""

    fixed: tuple[str, ...]
    training: tuple[str, ...]
    operational: tuple[str, ...]


def difference(old: RunConfig, new: RunConfig) -> Difference:
    """What changed from `old` to `new`. `lineage` is a request, not a value."""
    before, after = flatten(old), flatten(new)
    lines: dict[str, list[str]] = {kind: [] for kind in Difference._fields}
    for key in after:
        if before[key] != after[key] and key != "lineage":
            lines[kind_of(key)].append(f"{key}: {shown(before[key])} -> {shown(after[key])}")
    return Difference(**{kind: tuple(changes) for kind, changes in lines.items()})
