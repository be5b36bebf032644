"""What changed between two configurations, and what each change means for a run: fixed, training or
operational."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from opt_train.config.keys import keys_of
from opt_train.config.run_config import RunConfig
from opt_train.config.sentences import shown
from opt_train.protocol.keys import KeyKind

_KINDS = {key.name: key.kind for key in keys_of(RunConfig)}


def kind_of(key: str) -> KeyKind:
    """What a change of the dotted `key` means: ``fixed``, ``training`` or ``operational``, as the
    key's declaration says.

    Raises:
        KeyError: there is no such key.
    """
    return _KINDS[key]


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every key of the configuration, dotted, with its value, in the order of the dataclasses."""
    return dict(_flat(asdict(config), ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Difference(NamedTuple):
    """What changed between two configurations, by the kind of key, each as `key: old -> new`."""

    fixed: tuple[str, ...]
    training: tuple[str, ...]
    operational: tuple[str, ...]


def difference(old: RunConfig, new: RunConfig) -> Difference:
    """What changed from `old` to `new`. `lineage` and `ledger` are requests, not values."""
    before, after = flatten(old), flatten(new)
    # The fields are the values of `KeyKind`: a kind without a field raises at its first change.
    lines: dict[str, list[str]] = {kind: [] for kind in Difference._fields}
    for key in after:
        if before[key] != after[key] and key not in ("lineage", "ledger"):
            lines[kind_of(key)].append(f"{key}: {shown(before[key])} -> {shown(after[key])}")
    return Difference(**{kind: tuple(changes) for kind, changes in lines.items()})
